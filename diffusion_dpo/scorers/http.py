"""A judge of your own behind a server: for models whose packages do not go together with ours.

The server answers POST with JSON: `{"images": [PNG in base64], "prompts": [text], "references": [[PNG in base64]]}`
comes in (the last two only as far as `sends` names them), `{"metrics": {name: [number or null]}, "reasons": [text]}`
goes out, one value an image; null is a missing value, and `reasons`, which may be left out, says why.
`scripts/score_server.py` is such a server.
"""

import hashlib
import json
import math
from collections.abc import Sequence
from typing import Any, Literal, Self

import numpy as np
from pydantic import Field, field_validator, model_validator

from diffusion_dpo.config import Config, ConfigError
from diffusion_dpo.scorers import Metric, Need, ScoreRequest, Scores
from diffusion_dpo.scorers.remote import RemoteScorer, as_png, quoted

PROTOCOL = 1
"""Raise it when a change of this file changes the values."""
NO_VALUE = "the server gave no value"


class Given(Config):
    """A number that the server gives for every image."""

    name: str = Field(pattern=r"^[a-z][a-z0-9_]*$")
    """The metric's name, as the server writes it."""
    higher_is_better: bool = True
    """Its direction."""
    range: tuple[float | None, float | None] = (None, None)
    """The values it can take; null where there is no bound."""
    auxiliary: bool = False
    """True for a number that informs and never labels pairs."""

    @field_validator("range")
    @classmethod
    def _range_rises(cls, ends: tuple[float | None, float | None]) -> tuple[float | None, float | None]:
        low, high = ends
        if low is not None and high is not None and low >= high:
            raise ValueError("must rise: [lowest, highest], null where there is no bound")
        return ends


class Http(RemoteScorer):
    """Whatever a server of yours says of the images: JSON over HTTP."""

    licence = "that of the model behind the server"
    source = "the server"
    weights = "on the server"

    gives: list[Given] = Field(min_length=1)
    """The metrics that the server gives; the first is the main one."""
    sends: list[Literal["prompt", "reference"]] = ["prompt"]
    """What the server gets beside the images, and every image must then have."""
    version: str = Field(min_length=1, coerce_numbers_to_str=True)
    """What stands for the server's weights and code, which nobody here can see: change it whenever they change, and
    images are judged again."""

    @model_validator(mode="after")
    def _metrics_are_in_order(self) -> Self:
        names = [given.name for given in self.gives]
        if len(set(names)) < len(names):
            raise ValueError(f"gives names a metric twice: {', '.join(names)}")
        if self.gives[0].auxiliary:
            raise ValueError(f"the first of gives is the main metric, and {names[0]} is auxiliary; put another first")
        return self

    @property
    def needs(self) -> frozenset[Need]:
        """What `sends` names."""
        return frozenset(self.sends)

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """What `gives` names."""
        return tuple(_metric(given) for given in self.gives)

    def fingerprint(self) -> str:
        """Hash `version`, `gives` and `sends`; not the URL, since a server may move."""
        decides = [PROTOCOL, self.version, sorted(self.sends), [given.model_dump(mode="json") for given in self.gives]]
        return f"http-{PROTOCOL}-{hashlib.sha256(json.dumps(decides).encode()).hexdigest()[:16]}"

    def score(self, batch: Sequence[ScoreRequest]) -> Scores:
        """Ask once for the whole batch; raises ConfigError when the server is not there or answers nonsense."""
        body: dict[str, Any] = {"images": [as_png(request.image) for request in batch]}
        if "prompt" in self.sends:
            body["prompts"] = [request.prompt for request in batch]
        if "reference" in self.sends:
            body["references"] = [[as_png(image) for image in request.references] for request in batch]
        try:
            return _read(self.post(self.url, body), [given.name for given in self.gives], len(batch))
        except _NonsenseError as error:
            raise ConfigError(f"cannot use the answer of {self.url}: {error}; mend the server") from None


class _NonsenseError(ValueError):
    """The answer is JSON, and not an answer; the message says what came."""


def _metric(given: Given) -> Metric:
    low, high = given.range
    bounds = (-math.inf if low is None else low, math.inf if high is None else high)
    return Metric(given.name, given.higher_is_better, bounds, given.auxiliary)


def _read(answer: Any, names: list[str], count: int) -> Scores:
    if not isinstance(answer, dict) or not isinstance(answer.get("metrics"), dict):
        raise _NonsenseError(f'it must be {{"metrics": {{...}}}}, not {_shown(answer)}')
    if answer["metrics"].keys() != set(names):
        raise _NonsenseError(
            f"it has the metrics {quoted(str(sorted(answer['metrics'])))}, and `gives` names {sorted(names)}"
        )
    values = {name: _numbers(name, answer["metrics"][name], count) for name in names}
    said = answer.get("reasons") or [""] * count
    if not isinstance(said, list) or len(said) != count or not all(isinstance(one, str | None) for one in said):
        raise _NonsenseError(f"`reasons` must be {count} texts, one an image, not {_shown(said)}")
    lacking = np.isnan(np.stack(list(values.values()))).any(0)
    reasons = [quoted(reason or "") or (NO_VALUE if bare else "") for reason, bare in zip(said, lacking, strict=True)]
    return Scores(values, tuple(reasons))


def _numbers(name: str, values: Any, count: int) -> np.ndarray:
    if not isinstance(values, list):
        raise _NonsenseError(f"{name} must be a list, not {_shown(values)}")
    if len(values) != count:
        raise _NonsenseError(f"{name} has {len(values)} values for {count} images")
    return np.array([_number(name, value) for value in values])


def _number(name: str, value: Any) -> float:
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= 1e300:
        raise _NonsenseError(f"a value of {name} is {_shown(value)}, neither a finite number nor null")
    return float(value)


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
