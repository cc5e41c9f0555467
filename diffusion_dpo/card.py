"""What a finished run leaves for others: the adapter, a model card, and the environment it was made in."""

import importlib.metadata
import os
import platform
import shlex
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from diffusion_dpo import __version__
from diffusion_dpo.config import command
from diffusion_dpo.files import atomic_path, fsync_file, fsync_folder, write_json
from diffusion_dpo.models import DiffusionModel, LoadedModel
from diffusion_dpo.settings import TrainConfig

_PACKAGES = ("torch", "diffusers", "transformers", "peft", "safetensors", "open_clip_torch", "numpy", "pillow")


def write_environment(path: Path) -> None:
    """Write the versions that a run was made with."""
    versions = {name: importlib.metadata.version(name) for name in _PACKAGES}
    python = {"diffusion-dpo": __version__, "python": platform.python_version(), "platform": platform.platform()}
    write_json(path, python | versions)


def save_model(model: LoadedModel, run_dir: Path) -> Path:
    """Save the adapter or full UNet; an older one is removed only once the new one is whole and in its place."""
    for leftover in run_dir.glob(".staging-*"):
        shutil.rmtree(leftover)
    staging = run_dir / f".staging-{uuid.uuid4().hex[:8]}"
    staging.mkdir()
    saved = model.save(staging)
    for file in saved.iterdir():
        fsync_file(file)
    final = run_dir / saved.name
    if final.exists():
        os.replace(final, staging / "replaced")
    os.replace(saved, final)
    fsync_folder(run_dir)
    shutil.rmtree(staging)
    return final


def compare_command(config: TrainConfig) -> str:
    """Return the command that compares the result of this training with what it started from.

    Only the pocket model has prompts of its own; for another one PROMPTS.txt stands for a file that is to be named.
    """
    model = config.model.model_dump()
    base = {key: model[key] for key in ("pretrained", "revision", "variant") if model.get(key) is not None}
    sides = {f"{side}.{key}": value for side in ("before", "after") for key, value in base.items()}
    if model.get("adapter_path") is not None:
        sides["before.adapter_path"] = model["adapter_path"]
    prompts = {} if model.get("pretrained") == "pocket" else {"prompts_path": "PROMPTS.txt"}
    return command("compare", {**sides, "after.adapter_path": config.output_dir, **prompts})


def report_command(run_dir: Path) -> str:
    """Return the command that makes a page of what happened in a training run."""
    if "=" in str(run_dir):  # which the command line takes for a setting
        return command("report", {"path": run_dir})
    return shlex.join(["diffusion-dpo", "report", str(run_dir)])


def write_card(config: TrainConfig, adapter: Path, facts: Mapping[str, Any]) -> None:
    """Write README.md, the model card, with how to load the result."""
    model, loss = config.model.model_dump(), config.loss.model_dump()
    base = model.get("pretrained", model["type"])
    usage = cast(DiffusionModel, config.model).usage(adapter.name)
    prompts = config.preview.prompts if config.preview else ()
    image = f"image = pipe({(prompts or ('your prompt',))[0]!r}).images[0]"
    example = f"\n```python\n{usage}\n{image}\n```\n" if usage else ""
    is_lora = adapter.name == "adapter"
    kind, what = ("lora", "LoRA") if is_lora else ("full-fine-tuning", "full fine-tuning")
    text = f"""---
library_name: diffusers
base_model: {base}
tags: [diffusion-dpo, {loss["type"]}, {kind}]
---
# {config.output_dir.name}

{base}, tuned on {facts["num_pairs"]} rows of preference data with {loss["type"]} ({what}) by
diffusion-dpo {__version__}.
{example}
| setting | value |
|---|---|
| rows | {facts["num_pairs"]}, and {facts["num_held_out"]} held out |
| labelled by | {", ".join(facts["labelled_by"]) or "their source"} |
| steps | {facts["steps"]} of {config.global_batch_size} |
| learning rate | {config.learning_rate} |
| objective | {", ".join(f"{key}={value}" for key, value in loss.items())} |
| seed | {config.seed} |

Everything else is in `config.yaml` and `environment.json`; what happened at every step is in `metrics.jsonl`. How the
images changed, with intervals: `{compare_command(config)}`.
"""
    with atomic_path(config.output_dir / "README.md") as partial:
        partial.write_text(text, encoding="utf-8")
