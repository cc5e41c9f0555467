"""Settings for every registered scorer with tiny weights, which the contract tests and the bench run them with.

Each factory is called with an empty folder, and returns the settings of one or more variants.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.scorers.servers import chat, lighter, score_light, serve
from tests.scorers.tiny_clip import make_clip
from tests.scorers.tiny_faces import make_pack, make_recogniser, make_yunet
from tests.scorers.tiny_models import (
    HPS_ARCHITECTURE,
    make_dino,
    make_head,
    make_hps,
    make_transformers_clip,
    make_trunk,
)

Settings = dict[str, Any]


def _clip(folder: Path) -> list[Settings]:
    return [{"model": f"local-dir:{make_clip(folder)}"}]


def _lpips(folder: Path) -> list[Settings]:
    return [{**make_trunk(folder / "trunk.pth", "squeeze"), "resolution_px": 64}]


def _aesthetic(folder: Path) -> list[Settings]:
    return [{"encoder": str(make_transformers_clip(folder)), "head": str(make_head(folder / "head.pth"))}]


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


def _sface(folder: Path) -> list[Settings]:
    detector = make_yunet(folder / "yunet.onnx", anywhere=True)
    return [{"detector_path": detector, "recognizer_path": make_recogniser(folder / "sface.onnx", raw=True)}]


TINY: dict[str, Callable[[Path], list[Settings]]] = {
    "aesthetic": _aesthetic,
    "arcface": lambda folder: [{"model": str(make_pack(folder, anywhere=True)), "det_size_px": 128}],
    "brightness": lambda folder: [{}],
    "clip": _clip,
    "clip_diversity": _clip,
    "clip_image": _clip,
    "colorfulness": lambda folder: [{}],
    "dino": lambda folder: [{"pretrained": str(make_dino(folder))}],
    "diversity": _lpips,
    "hps": lambda folder: [{"pretrained": str(make_hps(folder)), "architecture": HPS_ARCHITECTURE}],
    "http": _http,
    "judge": _judge,
    "lpips": _lpips,
    "pickscore": lambda folder: [{"pretrained": str(make_transformers_clip(folder)), "processor": None}],
    "pocket_scene": lambda folder: [{}],
    "saturation": lambda folder: [{}],
    "sface": _sface,
    "sharpness": lambda folder: [{}],
}

NUM_VARIANTS = {"http": 2, "judge": 2}
"""How many variants a factory returns, where it is not one."""
