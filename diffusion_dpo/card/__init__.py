"""What a finished run leaves for others: the adapter, a model card, and the environment it was made in."""

import importlib.metadata
import json
import platform
import shlex
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusion_dpo import __version__
from diffusion_dpo.card.text import Shown, card_text
from diffusion_dpo.config import command
from diffusion_dpo.files import atomic_path, put_in_place, write_json
from diffusion_dpo.models import LoadedModel
from diffusion_dpo.settings import TrainConfig

_PACKAGES = ("torch", "diffusers", "transformers", "peft", "safetensors", "open_clip_torch", "numpy", "pillow")


def write_environment(path: Path) -> None:
    """Write the versions that a run was made with."""
    versions = {name: importlib.metadata.version(name) for name in _PACKAGES}
    python = {"diffusion-dpo": __version__, "python": platform.python_version(), "platform": platform.platform()}
    write_json(path, python | versions)


def save_model(model: LoadedModel, run_dir: Path) -> Path:
    """Save the adapter or full UNet; an older one stands until the new one is whole and takes its place."""
    staging = run_dir / f".model.{uuid.uuid4().hex[:8]}.partial"
    staging.mkdir()
    saved = model.save(staging)
    for file in saved.glob("*.json"):
        _forget_place(file)
    final = run_dir / saved.name
    put_in_place(saved, final)
    shutil.rmtree(staging)
    return final


def _forget_place(file: Path) -> None:
    """Take the folder of the base out of diffusers' settings: equal weights are equal files, wherever the base lay."""
    settings = json.loads(file.read_text(encoding="utf-8"))
    if settings.pop("_name_or_path", None) is not None:
        write_json(file, settings)


def compare_command(config: TrainConfig) -> str:
    """Return the command that compares the result of this training with what it started from.

    Only the pocket model has prompts of its own; for another one PROMPTS.txt stands for a file that is to be named.
    """
    model = config.model.model_dump()
    names = ("pretrained", "revision", "variant", "prediction_type")
    base = {key: model[key] for key in names if model.get(key) is not None}
    baseline = {f"baseline.{key}": value for key, value in base.items()}
    if model.get("adapter_path") is not None:
        baseline["baseline.adapter_path"] = model["adapter_path"]
    prompts = {} if model.get("pretrained") == "pocket" else {"prompts_path": "PROMPTS.txt"}
    return command("compare", {**baseline, "models.tuned.adapter_path": config.output_dir, **prompts})


def export_command(run_dir: Path) -> str:
    """Return the command that makes of a run's LoRA a file for programs that do not know diffusers' names."""
    return command("export", {"format": "kohya", "adapter_path": run_dir, "output_dir": run_dir / "kohya"})


def report_command(run_dir: Path) -> str:
    """Return the command that makes a page of what happened in a training run."""
    if "=" in str(run_dir):  # which the command line takes for a setting
        return command("report", {"path": run_dir})
    return shlex.join(["diffusion-dpo", "report", str(run_dir)])


def write_card(config: TrainConfig, adapter: Path, facts: Mapping[str, Any]) -> None:
    """Write README.md, the model card, with how to load the result."""
    with atomic_path(config.output_dir / "README.md") as partial:
        partial.write_text(local_card(config, adapter.name, facts), encoding="utf-8")


def local_card(config: TrainConfig, kind: str, facts: Mapping[str, Any]) -> str:
    """Return the card of a run folder as training leaves it; `kind` is `adapter` or `unet`."""
    return card_text(config, facts, Shown(kind=kind), next_command=compare_command(config))
