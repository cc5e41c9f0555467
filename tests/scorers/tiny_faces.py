"""Small ONNX detectors and recognisers in the forms that insightface and OpenCV read."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

_POINTS = np.array([[-0.4, -0.3], [0.4, -0.3], [0, 0.1], [-0.3, 0.5], [0.3, 0.5]], np.float32)


def _save(
    path: Path, nodes: list[Any], inputs: list[Any], outputs: list[Any], constants: dict[str, np.ndarray]
) -> Path:
    values = [numpy_helper.from_array(array, name) for name, array in constants.items()]
    graph = helper.make_graph(nodes, "tiny", inputs, outputs, values)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8), path)
    return path


def _heads(path: Path, heads: dict[str, tuple[int, int, np.ndarray, np.ndarray]], batched: bool) -> Path:
    """One convolution a head: name -> (stride, width of a row, weights (C, 3) of a cell's mean, bias (C,))."""
    constants: dict[str, np.ndarray] = {}
    nodes, outputs = [], []
    for name, (stride, width, weights, bias) in heads.items():
        kernel = np.tile(weights[:, :, None, None] / stride**2, (1, 1, stride, stride)).astype(np.float32)
        shape = np.array([1, -1, width] if batched else [-1, width], np.int64)
        constants |= {f"{name}_w": kernel, f"{name}_b": bias.astype(np.float32), f"{name}_s": shape}
        conv_inputs = ["input", f"{name}_w", f"{name}_b"]
        nodes += [
            helper.make_node("Conv", conv_inputs, [f"{name}_c"], kernel_shape=[stride] * 2, strides=[stride] * 2),
            helper.make_node("Transpose", [f"{name}_c"], [f"{name}_t"], perm=[0, 2, 3, 1]),
            helper.make_node("Reshape", [f"{name}_t", f"{name}_s"], [name]),
        ]
        dims = [1, None, width] if batched else [None, width]
        outputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, dims))
    image = helper.make_tensor_value_info("input", TensorProto.FLOAT, [1, 3, "h", "w"])
    return _save(path, nodes, [image], outputs, constants)


def make_detector(path: Path, *, anywhere: bool = False) -> Path:
    """SCRFD: a red cell of 8 px is a face, the larger the bluer; `anywhere`: whatever is not nearly black is one."""
    scale = 128 / 255  # the detector sees (x - 127.5) / 128

    def channels(weights: np.ndarray, bias: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return weights * scale, bias + weights.sum(1) / 2

    score = np.array([[0.17, 0.17, 0.16]] if anywhere else [[0.9, -0.9, 0.0]], np.float32)
    lowest = 0.45 if anywhere else 0.0
    half = (5.0, 3.0) if anywhere else (2.0, 2.0)
    blue = np.array([0, 0, 1], np.float32)
    heads = {}
    for kind in ("score", "box", "points"):
        for stride in (8, 16, 32):
            on = float(stride == 8)
            if kind == "score":
                rows, bias, width = np.concatenate([score, score * 0]) * on, np.array([lowest * on, 0]), 1
            else:
                unit = np.ones(4) if kind == "box" else _POINTS.ravel()
                unit = np.tile(unit, 2)
                rows, bias, width = half[1] * unit[:, None] * blue, half[0] * unit, len(unit) // 2
            heads[f"{kind}_{stride}"] = (stride, width, *channels(rows, bias))
    return _heads(path, heads, batched=False)


def make_recogniser(path: Path, *, raw: bool = False) -> Path:
    """A fixed random map of 8 x 8 mean colours to 32 numbers; `raw` pixels (SFace) are centred first."""
    matrix = np.random.default_rng(0).normal(size=(192, 32)).astype(np.float32)
    constants = {"matrix": matrix, "shape": np.array([1, 192], np.int64), "middle": np.array([127.5], np.float32)}
    nodes = [helper.make_node("Sub", ["input", "middle"], ["centred"], name="centre")] if raw else []
    nodes += [
        helper.make_node(
            "AveragePool", [nodes[0].output[0] if raw else "input"], ["p"], kernel_shape=[14] * 2, strides=[14] * 2
        ),
        helper.make_node("Reshape", ["p", "shape"], ["flat"]),
        helper.make_node("MatMul", ["flat", "matrix"], ["fc1"]),
    ]
    constants = constants if raw else {k: v for k, v in constants.items() if k != "middle"}
    image = helper.make_tensor_value_info("input", TensorProto.FLOAT, [1, 3, 112, 112])
    return _save(path, nodes, [image], [helper.make_tensor_value_info("fc1", TensorProto.FLOAT, [1, 32])], constants)


def make_pack(folder: Path, *, anywhere: bool = False) -> Path:
    """A folder as `arcface.model` takes it."""
    folder.mkdir(parents=True, exist_ok=True)
    make_detector(folder / "det.onnx", anywhere=anywhere)
    make_recogniser(folder / "rec.onnx")
    return folder


def make_yunet(path: Path, *, anywhere: bool = False) -> Path:
    """YuNet: as `make_detector`, but it sees blue first, 0 to 255, and says sqrt(cls * obj)."""
    score = np.array([[0.16, 0.17, 0.17]] if anywhere else [[0.0, -0.9, 0.9]]) / 255
    heads = {}
    for kind, width in (("cls", 1), ("obj", 1), ("bbox", 4), ("kps", 10)):
        for stride in (8, 16, 32):
            on = float(stride == 8)
            weights, bias = np.zeros((width, 3)), np.zeros(width)
            if kind in ("cls", "obj"):
                weights, bias = score * on, np.array([(0.45 if anywhere else 0.0) * on])
            elif kind == "bbox":
                bias = np.array([0, 0, np.log(10 if anywhere else 4), np.log(10 if anywhere else 4)])
                weights[2:, 0] = 0.7 / 255
            else:
                bias = _POINTS.ravel() * (5 if anywhere else 2)
            heads[f"{kind}_{stride}"] = (stride, width, weights, bias)
    return _heads(path, heads, batched=True)
