"""Settings for every registered scorer with tiny weights, which the contract tests and the bench run them with.

Each factory is called with an empty folder, and returns the settings of one or more variants.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.scorers.servers import chat, lighter, score_light, serve
from tests.scorers.tiny_clip import make_clip

Settings = dict[str, Any]


def _clip(folder: Path) -> list[Settings]:
    model = f"local-dir:{make_clip(folder)}"
    return [{"model": model, "mode": "text"}, {"model": model, "mode": "image"}]


def _http(folder: Path) -> list[Settings]:
    common = {"url": serve(score_light).url, "version": "1"}
    near = {"name": "remote_near", "range": [0, 1]}
    return [
        {**common, "gives": [{"name": "remote_light"}], "sends": []},
        {**common, "gives": [near], "sends": ["prompt", "reference"]},
    ]


def _judge(folder: Path) -> list[Settings]:
    common = {"url": chat(lighter).url, "model": "light"}
    return [
        {**common, "log_path": folder / "pairs.jsonl"},
        {**common, "log_path": folder / "points.jsonl", "mode": "pointwise"},
    ]


TINY: dict[str, Callable[[Path], list[Settings]]] = {
    "brightness": lambda folder: [{}],
    "clip": _clip,
    "http": _http,
    "judge": _judge,
    "pocket_scene": lambda folder: [{}],
}

NUM_VARIANTS = {"clip": 2, "http": 2, "judge": 2}
"""How many variants a factory returns, where it is not one."""
