"""Silence around libraries that log and warn while they load: an error is told once, in words of this package."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_CUTS = ("was truncated because", "Token indices sequence length is longer than")


@contextmanager
def quiet() -> Iterator[None]:
    """Silence diffusers, transformers and peft while they load or save: what went wrong is said once, by us."""
    import diffusers.utils.logging
    import transformers.utils.logging

    loggers: list[Any] = [diffusers.utils.logging, transformers.utils.logging]
    verbosities = [logger.get_verbosity() for logger in loggers]
    for logger in loggers:
        logger.set_verbosity(logger.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, verbosity in zip(loggers, verbosities, strict=True):
            logger.set_verbosity(verbosity)


def hush_cuts() -> None:
    """Keep diffusers and transformers from printing the tails of prompts that are cut; they are counted here."""
    for name in ("diffusers", "transformers"):
        for handler in logging.getLogger(name).handlers:
            handler.addFilter(_is_no_cut)


def _is_no_cut(record: logging.LogRecord) -> bool:
    return not any(words in str(record.msg) for words in _CUTS)
