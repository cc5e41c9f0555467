"""`doctor`: what this machine can do, in words or as JSON for a bug report (no tokens, no name of a home folder)."""

import importlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import sys
import threading
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any, NamedTuple

from diffusion_dpo import __version__
from diffusion_dpo.console import say

GIB = 2**30
HUB_TIMEOUT_SECONDS = 3.0
STACK = (
    "torch",
    "torchvision",
    "diffusers",
    "transformers",
    "accelerate",
    "peft",
    "open_clip_torch",
    "lpips",
    "safetensors",
    "huggingface_hub",
    "pyarrow",
    "pydantic",
    "pillow",
    "numpy",
)
POCKET_WEIGHTS = Path(__file__).parent / "pocket" / "weights"


class Extra(NamedTuple):
    """Something optional: what it adds, what to know about its licence, how to get it."""

    modules: tuple[str, ...]
    adds: str
    licence: str
    install: str


EXTRAS = {
    "face": Extra(
        ("insightface", "onnxruntime"),
        "face similarity",
        "code MIT; the insightface model packs are for non-commercial research only",
        "pip install 'diffusion-dpo[face]'",
    ),
    "label": Extra(
        ("starlette", "uvicorn"), "the page where people choose", "BSD-3-Clause", "pip install 'diffusion-dpo[label]'"
    ),
    "tensorboard": Extra(("tensorboard",), "training curves", "Apache-2.0", "pip install tensorboard"),
}


def run(as_json: bool = False) -> int:
    """Print the findings; return 0, or 2 when torch cannot be used."""
    findings = examine()
    if as_json:
        print(json.dumps(findings, indent=2))
    else:
        for line in _describe(findings):
            say(line)
    return 0 if findings["torch_error"] is None else 2


def examine() -> dict[str, Any]:
    """Look at everything; plain JSON. Sizes are in GiB."""
    devices, torch_error = _devices()
    findings: dict[str, Any] = {
        "diffusion_dpo": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu_cores": len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count(),
        "memory_gib": _memory_gib(),
        "devices": devices,
        "torch_error": torch_error,
        "disk": _disk(),
        "versions": {name: _version(name) for name in STACK},
        "extras": {
            name: {"installed": all(map(importlib.util.find_spec, extra.modules)), **extra._asdict()}
            for name, extra in EXTRAS.items()
        },
        "hub": _hub(),
        "pocket_weights": any(POCKET_WEIGHTS.rglob("*.safetensors")),
    }
    return findings | {"verdict": _verdict(findings)}


def _devices() -> tuple[list[dict[str, Any]], str | None]:
    """The devices that torch sees, the one that `device=auto` takes first; or why torch cannot be used."""
    for name in ("torch", "torchvision"):
        try:
            importlib.import_module(name)
        except (ImportError, OSError, RuntimeError) as error:  # RuntimeError: a torchvision built for another torch
            return [], f"{name} cannot be imported: {error}"
    import torch

    found: list[dict[str, Any]] = []
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        precisions = ["fp32", "fp16", "bf16"] if torch.cuda.is_bf16_supported() else ["fp32", "fp16"]
        found.append(
            {
                "device": f"cuda:{index}",
                "name": torch.cuda.get_device_name(index),
                "precision": precisions,
                "memory_gib": round(total / GIB, 1),
                "free_gib": round(free / GIB, 1),
            }
        )
    if torch.backends.mps.is_available():
        found.append({"device": "mps", "name": platform.processor(), "precision": ["fp32", "bf16"]})
    found.append({"device": "cpu", "name": platform.machine(), "precision": ["fp32", "bf16"]})
    return found, None


def _memory_gib() -> float:
    """Main memory that this process may use: the machine's, or its container's limit."""
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for path in (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes")):
        if path.exists() and (text := path.read_text().strip()).isdigit():
            limits.append(int(text))
    return round(min(limits) / GIB, 1)


def _disk() -> dict[str, dict[str, Any]]:
    """Free space where results go and where downloaded models go."""
    from huggingface_hub import constants

    places = {"here": Path.cwd(), "model_cache": Path(constants.HF_HUB_CACHE)}
    return {
        name: {
            "path": _without_home(path),
            "free_gib": round(shutil.disk_usage(_nearest_existing(path)).free / GIB, 1),
        }
        for name, path in places.items()
    }


def _without_home(path: Path) -> str:
    return str(Path("~") / path.relative_to(Path.home()) if path.is_relative_to(Path.home()) else path)


def _nearest_existing(path: Path) -> Path:
    return next(folder for folder in (path, *path.parents) if folder.exists())


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _hub() -> str:
    """`reachable`, `offline`, or why not reachable. Asked in a thread, since a name look-up knows no time limit."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return "offline: HF_HUB_OFFLINE is set"
    answer = [f"not reachable: no answer from {constants.ENDPOINT} in {HUB_TIMEOUT_SECONDS:.0f} s"]

    def ask() -> None:
        try:
            urllib.request.urlopen(constants.ENDPOINT, timeout=HUB_TIMEOUT_SECONDS).close()
            answer[0] = "reachable"
        except urllib.error.HTTPError:  # it answers, which is all we ask
            answer[0] = "reachable"
        except (OSError, ValueError) as error:
            answer[0] = f"not reachable: {constants.ENDPOINT}: {error}"

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(HUB_TIMEOUT_SECONDS)
    return answer[0]


def _verdict(findings: dict[str, Any]) -> str:
    """One line on what this machine can train. Sizes are for Stable Diffusion 1.5 at 512 px, one pair at a time."""
    if findings["torch_error"] is not None:
        return f"{findings['torch_error']}. Install it again: pip install --force-reinstall torch torchvision"
    if not findings["pocket_weights"]:
        return "The pocket model's weights are missing from the installation: install diffusion-dpo again."
    if shutil.which("nvidia-smi") and not any(device["device"].startswith("cuda") for device in findings["devices"]):
        return (
            "This machine has NVIDIA's tools, but torch sees no GPU: compare the driver's CUDA version (nvidia-smi) "
            "with torch's (python -m torch.utils.collect_env). Until then everything runs on the CPU."
        )
    memory = max((device.get("memory_gib", 0) for device in findings["devices"]), default=0)
    if memory >= 22:
        return "Ready for LoRA and for full fine-tuning of Stable Diffusion 1.5 at 512 px."
    if memory >= 10:
        return "Ready for LoRA on Stable Diffusion 1.5 at 512 px; full fine-tuning wants a card of 24 GiB."
    if memory >= 6:
        return "Ready for LoRA on Stable Diffusion 1.5 at 512 px with gradient_checkpointing=true."
    return "Ready for the demo and for small models; Stable Diffusion 1.5 wants a GPU with 8 GiB or more."


def _describe(findings: dict[str, Any]) -> list[str]:
    """The findings as lines of text, the verdict last."""
    rows = [
        ("diffusion-dpo", f"{findings['diffusion_dpo']}, Python {findings['python']}, {findings['platform']}"),
        ("machine", f"{findings['cpu_cores']} cores, {findings['memory_gib']} GiB of memory"),
    ]
    for device in findings["devices"]:
        size = f", {device['free_gib']} of {device['memory_gib']} GiB free" if "memory_gib" in device else ""
        rows.append((device["device"], f"{device['name']}, {' '.join(device['precision'])}{size}"))
    names = {"here": "disk here", "model_cache": "model cache"}
    rows += [(names[key], f"{disk['free_gib']} GiB free at {disk['path']}") for key, disk in findings["disk"].items()]
    rows.append(("hub", findings["hub"]))
    versions = [f"{name} {version or 'MISSING'}" for name, version in findings["versions"].items()]
    rows += [("versions" if start == 0 else "", ", ".join(versions[start : start + 5])) for start in range(0, 14, 5)]
    for name, extra in findings["extras"].items():
        state = "installed" if extra["installed"] else f"not installed: {extra['install']}"
        rows.append((f"extra {name}", f"{extra['adds']} ({extra['licence']}); {state}"))
    return [*(f"{label:<18}{text}" for label, text in rows), "", findings["verdict"]]
