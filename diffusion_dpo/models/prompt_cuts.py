"""Prompts that the text encoders of a pipeline cut: said in one line, in place of what diffusers prints."""

import logging
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from diffusion_dpo.console import warn
from diffusion_dpo.data.prompt_words import Cuts, describe_syntax, find_cuts

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

_WALLS = ("was truncated because", "Token indices sequence length is longer than")


class _NoWalls(logging.Filter):
    """Drops the cut tails that diffusers prints for every batch of prompts, and what transformers says of each."""

    def filter(self, record: logging.LogRecord) -> bool:
        return not any(wall in str(record.msg) for wall in _WALLS)


_NO_WALLS = _NoWalls()


def hush() -> None:
    """Keep diffusers and transformers from printing prompts that are cut; see `find_pipeline_cuts`."""
    for name in ("diffusers", "transformers"):
        for handler in logging.getLogger(name).handlers:
            handler.addFilter(_NO_WALLS)


class Told:
    """What is said of prompts once, though several models draw them."""

    def __init__(self) -> None:
        self._said: set[str] = set()

    def of_syntax(self, prompts: Iterable[str]) -> None:
        """Say how many are in the syntax of other programs."""
        self.once(describe_syntax(prompts))

    def of_cuts(self, pipeline: "DiffusionPipeline", prompts: Iterable[str]) -> None:
        """Say how many are cut by a pipeline."""
        self.once(find_pipeline_cuts(pipeline, prompts).describe())

    def once(self, text: str) -> None:
        """Say a text, unless it is empty or was said before."""
        if text and text not in self._said:
            self._said.add(text)
            warn(text)


def find_pipeline_cuts(pipeline: "DiffusionPipeline | None", prompts: Iterable[str]) -> Cuts:
    """Return which prompts are cut.

    The two tokenizers of SDXL differ in what fills the rest alone: one stands for both.
    """
    tokenizer: Any = getattr(pipeline, "tokenizer", None)
    if tokenizer is None:  # a model of somebody's own, which may encode prompts as it likes
        return Cuts(0)

    def encode(texts: list[str]) -> Sequence[Sequence[int]]:
        found: Sequence[Sequence[int]] = tokenizer(texts, truncation=False, verbose=False).input_ids
        return found

    return find_cuts(prompts, int(tokenizer.model_max_length), encode)
