"""Settings for every registered scorer with tiny weights, which the contract tests and the bench run them with.

Each factory is called with an empty folder, and returns the settings of one or more variants.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.scorers.tiny_clip import make_clip

Settings = dict[str, Any]


def _clip(folder: Path) -> list[Settings]:
    model = f"local-dir:{make_clip(folder)}"
    return [{"model": model, "mode": "text"}, {"model": model, "mode": "image"}]


TINY: dict[str, Callable[[Path], list[Settings]]] = {
    "brightness": lambda folder: [{}],
    "clip": _clip,
    "colorfulness": lambda folder: [{}],
    "pocket_scene": lambda folder: [{}],
    "saturation": lambda folder: [{}],
    "sharpness": lambda folder: [{}],
}

NUM_VARIANTS = {"clip": 2}
"""How many variants a factory returns, where it is not one."""
