"""The framework around a scorer: batches, halves them when memory is short, and believes nothing that comes back.

A scorer is then a few lines of arithmetic, and a wrong scorer is found at its first batch instead of in a bad model.
"""

import hashlib
import re
import signal
import threading
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from diffusion_dpo.config import ConfigError
from diffusion_dpo.console import warn
from diffusion_dpo.scorers import Metric, Scorer, ScoreRequest, Scores

if TYPE_CHECKING:
    from PIL import Image

_RANGE_TOLERANCE = 1e-4
"""How far, relative to the width of the range, rounding may carry a value out of it."""
_METRIC_NAME = re.compile(r"[a-z][a-z0-9_]*")
_PATIENCE = 8
"""So many images without any that could be judged, and it is not the images."""
FAILED = "the scorer failed: "
"""How the reason begins where a scorer raised; such images are judged again by the next run."""


class ScorerContractError(ConfigError):
    """A scorer broke its contract: the message names the scorer, the metric and what is wrong with it."""


def judge(
    scorer: Scorer,
    requests: Sequence[ScoreRequest],
    *,
    batch_size: int,
    advance: Callable[[int], None] = lambda count: None,
) -> Scores:
    """Score all requests with a loaded scorer and warn of metrics that are the same for every image.

    Returns float64 arrays of shape (len(requests),) for every metric of the scorer, NaN where an image cannot be
    scored, and as many reasons. `advance(count)` is called after every batch. Raises ConfigError when a request lacks
    what the scorer needs, ScorerContractError when the scorer's answer breaks its contract.
    """
    scores = Judge(scorer, batch_size=batch_size).score(requests, advance=advance)
    warn_if_constant(scorer.metrics, scores.values)
    return scores


class Judge:
    """A loaded scorer at work; it remembers, from call to call, the batch size that fits in memory."""

    def __init__(
        self,
        scorer: Scorer,
        *,
        batch_size: int,
        timeout_seconds: float | None = None,
        has_answered: bool = False,
    ) -> None:
        self.scorer = scorer
        self.batch_size = batch_size
        self.timeout_seconds = timeout_seconds
        self.has_answered = has_answered
        """Whether it has ever judged an image: then one on which it fails is the image's fault."""
        self._num_failed = 0

    def score(
        self, requests: Sequence[ScoreRequest], *, advance: Callable[[int], None] = lambda count: None
    ) -> Scores:
        """Score all requests; as `judge`, without the warning, for those who come with one shard at a time.

        Equal requests are scored once, so that they tie exactly: in two batches, rounding could set them apart.
        """
        lacking = {
            "prompt": sum(not request.prompt.strip() for request in requests),
            "reference": sum(not request.references for request in requests),
        }
        refuse_lacking(self.scorer, lacking, len(requests))
        keys = _keys(requests)
        unique = dict(zip(keys, requests, strict=True))
        scores = self._score_unique(list(unique.values()), advance)
        advance(len(requests) - len(unique))
        place = {key: i for i, key in enumerate(unique)}
        order = np.array([place[key] for key in keys], dtype=np.intp)
        values = {name: array[order] for name, array in scores.values.items()}
        return Scores(values, tuple(scores.reasons[i] for i in order))

    def _score_unique(self, requests: Sequence[ScoreRequest], advance: Callable[[int], None]) -> Scores:
        parts: list[Scores] = []
        start = 0
        while start < len(requests):
            batch = requests[start : start + self.batch_size]
            scores = self._try(batch)
            if scores is not None:
                parts.append(scores)
                start += len(batch)
                advance(len(batch))
        return _joined(self.scorer, parts)

    def _try(self, batch: Sequence[ScoreRequest]) -> Scores | None:
        """Return the checked scores of a batch, or None after halving the batch size because memory ran out."""
        import torch

        try:
            return self._ask(batch)
        except torch.OutOfMemoryError:
            if len(batch) == 1:
                raise ConfigError(
                    f"the scorer {self.scorer.type} needs more memory than the device has, even for one image; "
                    "set device=cpu"
                ) from None
        except ConfigError:
            raise
        except (Exception, SystemExit) as error:  # noqa: BLE001 - anybody's code, and one odd image must not end the run
            return self._spare_the_others(batch, error)
        torch.cuda.empty_cache()
        self.batch_size = len(batch) // 2
        warn(f"out of memory with {len(batch)} images at once; going on with batch_size={self.batch_size}")
        return None

    def _ask(self, batch: Sequence[ScoreRequest]) -> Scores:
        try:
            with _deadline(self.timeout_seconds):
                scores = self.scorer.score(batch)
        except _Overdue:
            raise ConfigError(
                f"the scorer {self.scorer.type} gave no answer on {len(batch)} images within "
                f"batch_timeout_seconds={self.timeout_seconds:g}; what was judged is kept. Is it stuck? If it is only "
                "slow, raise that, or lower batch_size"
            ) from None
        self.has_answered = True
        return _checked(self.scorer, scores, len(batch))

    def _spare_the_others(self, batch: Sequence[ScoreRequest], error: BaseException) -> Scores:
        """Judge one by one the images of a batch on which a scorer raised; those that it raises on again are NaN.

        Raises ConfigError where it is not the images: many are tried, and none can be judged.
        """
        parts = [self._alone(request) for request in batch] if len(batch) > 1 else [self._failure(error)]
        self._num_failed += sum(part.reasons[0].startswith(FAILED) for part in parts)
        if not self.has_answered and self._num_failed >= _PATIENCE:
            raise ConfigError(f"the scorer {self.scorer.type} fails on every image: {_said(error)}") from error
        return _joined(self.scorer, parts)

    def _alone(self, request: ScoreRequest) -> Scores:
        try:
            return self._ask([request])
        except ConfigError:
            raise
        except (Exception, SystemExit) as error:  # noqa: BLE001 - as above
            return self._failure(error)

    def _failure(self, error: BaseException) -> Scores:
        return Scores({metric.name: np.full(1, np.nan) for metric in self.scorer.metrics}, (FAILED + _said(error),))


def _said(error: BaseException) -> str:
    """What was raised, and where."""
    place = traceback.extract_tb(error.__traceback__)[-1]
    text = " ".join(str(error).split())[:200]
    return f"{type(error).__name__}: {text} ({Path(place.filename).name} line {place.lineno})"


class _Overdue(BaseException):
    """The time for a batch is over; like KeyboardInterrupt it passes every `except Exception`."""


@contextmanager
def _deadline(seconds: float | None) -> Iterator[None]:
    """Raise _Overdue within, once the seconds are over. Only a main thread can be interrupted, and only in Python."""
    if seconds is None or threading.current_thread() is not threading.main_thread():
        yield
        return

    def ring(*_: object) -> None:
        raise _Overdue

    before = signal.signal(signal.SIGALRM, ring)
    timer = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, *timer)
        signal.signal(signal.SIGALRM, before)


def check_metrics(scorers: Sequence[Scorer]) -> None:
    """Refuse a list of scorers whose metrics cannot be told apart; raises ConfigError."""
    if not scorers:
        raise ConfigError("scorers is empty; name at least one, e.g. scorers=[clip]")
    owners: dict[str, str] = {}
    for scorer in scorers:
        for metric in scorer.metrics:
            if not _METRIC_NAME.fullmatch(metric.name):
                raise ConfigError(f"the scorer {scorer.type} calls a metric {metric.name!r}; use a-z, 0-9 and _ only")
            if metric.name in owners:
                raise ConfigError(
                    f"the scorers {owners[metric.name]} and {scorer.type} both give the metric {metric.name!r}; "
                    "remove one of them, or set its `name` where it has that setting"
                )
            owners[metric.name] = scorer.type


def warn_if_constant(metrics: Sequence[Metric], values: Mapping[str, np.ndarray]) -> None:
    """Warn of main metrics that give several images one and the same value: they can prefer nothing."""
    for metric in metrics:
        known = values[metric.name][np.isfinite(values[metric.name])]
        if not metric.auxiliary and len(known) > 1 and np.ptp(known) == 0:
            warn(f"{metric.name} is {known[0]:g} for all {len(known)} images, so it cannot tell better from worse")


def _keys(requests: Sequence[ScoreRequest]) -> list[tuple[str | bytes, ...]]:
    """Return keys that are equal for requests with the same pixels, prompt, references and rivals.

    Hashing every pixel takes as long as a small judge does; only what a few pixels cannot tell apart needs it.
    """
    rough = [(request.prompt, *_each(_sample, request)) for request in requests]
    times = Counter(rough)
    return [
        (*key, *_each(_digest, request)) if times[key] > 1 else key
        for key, request in zip(rough, requests, strict=True)
    ]


def _each(describe: "Callable[[Image.Image], bytes]", request: ScoreRequest) -> Iterator[str | bytes]:
    yield f"{len(request.references)} {request.copies}"
    yield from (describe(image) for image in (request.image, *request.references, *request.rivals))


def _sample(image: "Image.Image") -> bytes:
    return b"%d %d " % image.size + image.resize((16, 16), resample=0).tobytes()  # 0: the nearest pixels


def _digest(image: "Image.Image") -> bytes:
    return hashlib.sha256(image.tobytes()).digest()


def refuse_lacking(scorer: Scorer, lacking: Mapping[str, int], total: int, *, first: str = "") -> None:
    """Raise ConfigError when images lack what a scorer needs; `lacking` counts those without prompt and reference."""
    for need in sorted(scorer.needs & lacking.keys()):
        if lacking[need]:
            column = {
                "prompt": "a `prompt`, `text` or `caption` (or set prompt_column)",
                "reference": "`references`",
            }[need]
            raise ConfigError(
                f"the scorer {scorer.type} needs a {need} for every image, and {lacking[need]} of {total} images have "
                f"none{f', first {first}' if first else ''}; add {column} to the data, or leave this scorer out"
            )


def _joined(scorer: Scorer, parts: Sequence[Scores]) -> Scores:
    values = {
        metric.name: np.concatenate([np.empty(0), *(part.values[metric.name] for part in parts)])
        for metric in scorer.metrics
    }
    return Scores(values, tuple(reason for part in parts for reason in part.reasons))


def _checked(scorer: Scorer, scores: Scores, count: int) -> Scores:
    """Return the answer to a batch as float64 with a reason for every image; raises ScorerContractError."""
    names = [metric.name for metric in scorer.metrics]
    if sorted(scores.values) != sorted(names):
        raise ScorerContractError(
            f"scorer {scorer.type} declares the metrics {names} and returned {list(scores.values)}"
        )
    if scores.reasons and len(scores.reasons) != count:
        raise ScorerContractError(f"scorer {scorer.type} returned {len(scores.reasons)} reasons for {count} images")
    if not all(isinstance(reason, str) for reason in scores.reasons):
        raise ScorerContractError(f"scorer {scorer.type} returned a reason that is no text: {scores.reasons[:3]}")
    reasons = tuple(scores.reasons) or ("",) * count
    for metric in scorer.metrics:
        complaint = _complaint(metric, scores.values[metric.name], reasons)
        if complaint:
            raise ScorerContractError(f"scorer {scorer.type}, metric {metric.name}: {complaint}")
    return Scores({name: scores.values[name].astype(np.float64) for name in names}, reasons)


def _complaint(metric: Metric, values: np.ndarray, reasons: tuple[str, ...]) -> str:
    """Say what is wrong with the values of a batch; empty where all is well."""
    if not isinstance(values, np.ndarray) or not np.issubdtype(values.dtype, np.floating):
        return f"must be a float array, not {getattr(values, 'dtype', type(values).__name__)}"
    if values.shape != (len(reasons),):
        return f"has shape {values.shape} for {len(reasons)} images"
    if np.isinf(values).any():
        return "is infinite; return NaN and a reason where an image cannot be scored"
    if any(np.isnan(value) and not reason for value, reason in zip(values, reasons, strict=True)):
        return "is NaN without a reason"
    low, high = metric.range
    slack = _RANGE_TOLERANCE * (high - low if np.isfinite(high - low) else 1.0)
    outside = values[(values < low - slack) | (values > high + slack)]
    return f"is {outside[0]:g}, outside its range [{low:g}, {high:g}]" if len(outside) else ""
