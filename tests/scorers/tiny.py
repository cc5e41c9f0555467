"""Settings for every registered scorer with tiny weights, which the contract tests and the bench run them with.

Each factory is called with an empty folder, and returns the settings of one or more variants.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.scorers.tiny_clip import make_clip
from tests.scorers.tiny_faces import make_pack, make_recogniser, make_yunet

Settings = dict[str, Any]


def _clip(folder: Path) -> list[Settings]:
    model = f"local-dir:{make_clip(folder)}"
    return [{"model": model, "mode": "text"}, {"model": model, "mode": "image"}]


def _sface(folder: Path) -> list[Settings]:
    detector = make_yunet(folder / "yunet.onnx", anywhere=True)
    return [{"detector_path": detector, "recognizer_path": make_recogniser(folder / "sface.onnx", raw=True)}]


TINY: dict[str, Callable[[Path], list[Settings]]] = {
    "arcface": lambda folder: [{"model": str(make_pack(folder, anywhere=True)), "det_size_px": 128}],
    "brightness": lambda folder: [{}],
    "clip": _clip,
    "pocket_scene": lambda folder: [{}],
    "sface": _sface,
}

NUM_VARIANTS = {"clip": 2}
"""How many variants a factory returns, where it is not one."""
