"""A tuned model -> files that other programs load, each loaded back by diffusers and compared before it is kept."""

import os
import shlex
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusion_dpo.card import ancestry
from diffusion_dpo.card.public import public_name
from diffusion_dpo.config import ConfigError, command
from diffusion_dpo.console import progress, say, warn
from diffusion_dpo.device import pick_device
from diffusion_dpo.exporting.header import generation, kohya_header, model_header
from diffusion_dpo.exporting.lora import as_kohya, common_alpha
from diffusion_dpo.exporting.merged import write_merged
from diffusion_dpo.exporting.probe import Answers, Probe, changes, difference, does_something, networks_changed
from diffusion_dpo.exporting.public import as_diffusers_loads, where_it_differs, why_it_may_differ
from diffusion_dpo.exporting.single_file import load_single_file
from diffusion_dpo.exporting.source import Base, find_base, find_source, name_of
from diffusion_dpo.files import MANIFEST, claim, finish, fsync_file, fsync_folder, hashes_of
from diffusion_dpo.models.adapters import AdapterKind, replace_unet
from diffusion_dpo.models.checkpoint_file import header_settings
from diffusion_dpo.models.lora_file import PARTS, Layers, place, read_lora
from diffusion_dpo.models.lora_layers import add_to_weights, parts_of
from diffusion_dpo.models.lora_write import LORA_FILE, write_lora
from diffusion_dpo.models.original_layout import as_original
from diffusion_dpo.models.pipeline import first_sentence
from diffusion_dpo.models.quiet import quiet
from diffusion_dpo.models.safetensors_file import write_safetensors
from diffusion_dpo.sampling import adapter_hash, identity_of
from diffusion_dpo.settings import ExportConfig, ImageModel
from diffusion_dpo.settings.sharing import LORA_FORMATS

if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline

_TOLERANCE, _TOLERANCE_FP16 = 0.01, 0.05
"""How much of what the adapter changes may be lost, the latter to the rounding of a LoRA's weights. An alpha that is
forgotten, a layer that is not found, a wrong name cost far more."""
_ROUNDING_TO_MENTION, _ROUNDING_TO_REFUSE = 0.1, 0.5
"""How much the rounding of whole weights may move the model, as a share of what the adapter changes."""


@dataclass(frozen=True)
class _Tuned:
    """The model in memory: what its parts answer without and with the adapter, and what a LoRA adds.

    What is expected of a LoRA is the arithmetic of its file: B A alpha / r, added to the weights.
    """

    probe: Probe
    base: Answers
    expected: Answers
    layers: Layers


def export_adapter(config: ExportConfig) -> Path:
    """Write a tuned model in one of the formats of models, and verify it; return the folder.

    Raises ConfigError, and leaves nothing behind, when the adapter does nothing, cannot be had in this format, or when
    what was written computes something else than the model in memory.
    """
    assert config.adapter_path is not None
    base = find_base(config.adapter_path, config)
    kind, where, base = find_source(config.adapter_path, base)
    if kind == "unet" and config.format in LORA_FORMATS:
        raise ConfigError(
            f"{where} is a whole UNet, not a LoRA; export it with format=single_file (one checkpoint) or "
            "format=merged (a diffusers folder)"
        )
    if kind == "unet" and config.adapter_scale != 1:
        raise ConfigError(f"{where} is a whole UNet, which has no strength; leave adapter_scale out")
    name = name_of(config.adapter_path)
    identity = _identity(config, base)
    is_new = not config.output_dir.exists()
    with claim(config.output_dir, "export", identity) as before:
        there = hashes_of(config.output_dir, before.get("files", ()))
        if before.get("complete") and there and all(there.values()) and before.get("sha256", there) == there:
            name = before["name"]
            say(f"export: {config.output_dir} holds this already, verified")
        else:
            with _clean(config.output_dir, is_new=is_new):
                facts = _make(config, kind, where, base, name)
                adapter = adapter_hash(config.adapter_path)
                facts |= ancestry.of_model(base.pretrained, config.adapter_path).facts()
                facts["sha256"] = hashes_of(config.output_dir, facts["files"])
                finish(config.output_dir, "export", identity, name=name, adapter=adapter, **facts)
    _say_how_to_use(config, base, name)
    return config.output_dir


def _identity(config: ExportConfig, base: Base) -> dict[str, Any]:
    model = ImageModel.model_validate(asdict(base))
    return {
        "format": config.format,
        "dtype": config.dtype,
        "adapter_scale": config.adapter_scale,
        "model": identity_of(model.model_copy(update={"adapter_path": config.adapter_path})),
    }


@contextmanager
def _clean(folder: Path, *, is_new: bool) -> Iterator[None]:
    """Leave nothing behind of an export that failed: neither a file nor a folder that was not there before."""
    before = set(folder.iterdir())
    try:
        yield
    except BaseException:
        if is_new:
            shutil.rmtree(folder)
        else:
            for path in set(folder.iterdir()) - before:
                _remove(path)
            if before <= {folder / MANIFEST, folder / ".lock"}:  # otherwise the same command has to find its own
                (folder / MANIFEST).unlink()
        raise


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()


def _make(config: ExportConfig, kind: AdapterKind, where: Path, base: Base, name: str) -> dict[str, Any]:
    for left in config.output_dir.glob(".staging-*"):  # of a run that was killed
        shutil.rmtree(left)
    staging = config.output_dir / f".staging-{uuid.uuid4().hex[:8]}"
    staging.mkdir()
    device = pick_device(config.device)
    with progress("export", 4, "steps") as advance:
        pipeline = base.load(device)
        advance(1, "the base")
        tuned = _tune(config, kind, where, pipeline)
        if config.format not in LORA_FORMATS:
            with quiet():
                tuned = _rounded(config, pipeline, tuned)
        advance(1, "the adapter")
        with quiet():
            _write(config, pipeline, tuned.layers, staging, name, base)
        family = type(pipeline)
        del pipeline  # so that there is never more than one model in memory
        advance(1, "written")
        with quiet():
            again = _load_back(config, base, family, staging, name, device)
        found = tuned.probe.ask(again)
        rounded = config.dtype == "fp16" and config.format in LORA_FORMATS
        wrong = difference(tuned.base, tuned.expected, found, tolerance=_TOLERANCE_FP16 if rounded else _TOLERANCE)
        if wrong is not None:
            advice = "; dtype=fp32 may keep what fp16 rounds away" if rounded else ""
            raise ConfigError(
                f"what was written as format={config.format} is not the model in memory: {wrong}. Nothing was "
                f"kept{advice}"
            )
        advance(1, "verified")
    moved, off = changes(tuned.base, tuned.expected), changes(tuned.expected, found)
    _say_verified(moved, off)
    files = sorted(str(path.relative_to(staging)) for path in staging.rglob("*") if path.is_file())
    _move_in(staging, config.output_dir)
    return {"files": files, "changes": moved, "differences": off}


def _move_in(staging: Path, folder: Path) -> None:
    """Move what is verified to where it belongs, on the disk for good."""
    for path in sorted(staging.rglob("*")):
        if path.is_file():
            fsync_file(path)
        else:
            fsync_folder(path)
    for path in sorted(staging.iterdir()):
        if (folder / path.name).is_dir():  # of a run that was killed here
            shutil.rmtree(folder / path.name)
        os.replace(path, folder / path.name)
    staging.rmdir()
    fsync_folder(folder)


def _tune(config: ExportConfig, kind: AdapterKind, where: Path, pipeline: "DiffusionPipeline") -> _Tuned:
    probe = Probe.of(pipeline)
    base = probe.ask(pipeline)
    layers: Layers = {}
    if kind == "unet":
        replace_unet(pipeline, where)
    else:
        layers = place(read_lora(where), parts_of(pipeline))
        if config.format not in LORA_FORMATS:
            _refuse_new_biases(pipeline, layers)
        public = as_diffusers_loads(where, pipeline, probe)
        add_to_weights(parts_of(pipeline), layers, scale=config.adapter_scale)
        layers = {
            part: {path: replace(layer, alpha=layer.alpha * config.adapter_scale) for path, layer in of_part.items()}
            for part, of_part in layers.items()
        }
    expected = probe.ask(pipeline)
    if not does_something(changes(base, expected)):
        raise ConfigError(
            f"{config.adapter_path} does nothing: with it, the model computes the same as without (adapter_scale="
            f"{config.adapter_scale:g}). Was it saved before training, or was the learning rate too low?"
        )
    if kind == "lora" and config.adapter_scale == 1 and (wrong := where_it_differs(where, public, base, expected)):
        if (why := why_it_may_differ(where, public, layers)) is None:
            raise ConfigError(
                f"{wrong}, for no reason that is known. One of the two readings is wrong, so that nothing can be "
                "verified; please report it, with the file's header"
            )
        warn(f"{wrong}: {why}; what is written here is right")
    return _Tuned(probe, base, expected, layers)


def _refuse_new_biases(pipeline: "DiffusionPipeline", layers: Layers) -> None:
    """Raise ConfigError where a LoRA brings biases for layers that have none; whole weights have no place for them."""
    for part, of_part in layers.items():
        for path, layer in of_part.items():
            if layer.bias is not None and pipeline.components[part].get_submodule(path).bias is None:
                raise ConfigError(
                    f"this LoRA cannot be merged: it has a bias for {part}.{path}, which has none; format=diffusers "
                    "keeps it as it is"
                )


def _rounded(config: ExportConfig, pipeline: "DiffusionPipeline", tuned: _Tuned) -> _Tuned:
    """Round all weights as they will be written; what the model answers then is expected.

    Rounding is no mistake, but it moves the whole model: how far, compared with the adapter, is said or refused.
    """
    import torch

    if config.dtype == "fp32":
        return tuned
    for dtype in (_dtype(config), torch.float32):
        _cast(pipeline, dtype)
    rounded = tuned.probe.ask(pipeline)
    effect, off = changes(tuned.base, tuned.expected), changes(tuned.expected, rounded)
    share, part = max((off[part] / effect[part], part) for part in networks_changed(effect))
    moves = f"rounding the weights to fp16 moves the {part.replace('_', ' ')} by {share:.0%} of what the adapter does"
    if share > _ROUNDING_TO_REFUSE:
        raise ConfigError(f"{moves}; use dtype=fp32, or format=kohya or diffusers, which keep the adapter apart")
    if share > _ROUNDING_TO_MENTION:
        warn(f"{moves}; see dtype=fp32")
    return replace(tuned, expected=rounded)


def _cast(pipeline: "DiffusionPipeline", dtype: "torch.dtype") -> None:
    for part in ("vae", *PARTS):
        if part in pipeline.components:
            pipeline.components[part].to(dtype)


def _write(
    config: ExportConfig,
    pipeline: "DiffusionPipeline",
    layers: Layers,
    staging: Path,
    name: str,
    base: Base,
) -> None:
    dtype = _dtype(config)
    learnt_from = ancestry.of_model(base.pretrained, config.adapter_path).header()
    if config.format in LORA_FORMATS:
        header = model_header(pipeline, name, lora=True) | learnt_from
        every = [layer for of_part in layers.values() for layer in of_part.values()]
        ranks, alphas = [layer.rank for layer in every], [float(layer.rank) for layer in every]
        if config.format == "kohya":  # in whose names all layers of a part have one
            alphas = [common_alpha(of_part) for of_part in layers.values()]
        header |= kohya_header(pipeline, ranks, alphas, name=name, base=public_name(base.pretrained))
        if config.format == "kohya":
            weights = as_kohya(layers, dtype, two_encoders=generation(pipeline) == "xl")
            write_safetensors(staging / f"{name}.safetensors", weights, header)
        else:
            write_lora(staging / LORA_FILE, layers, dtype, header)
        return
    _cast(pipeline, dtype)
    if config.format == "merged":
        write_merged(pipeline, staging)
        return
    weights = {key: value.cpu().contiguous() for key, value in as_original(pipeline.components).items()}
    header = model_header(pipeline, name, lora=False) | header_settings(pipeline) | learnt_from
    write_safetensors(staging / f"{name}.safetensors", weights, header)


def _load_back(
    config: ExportConfig,
    base: Base,
    family: type["DiffusionPipeline"],
    staging: Path,
    name: str,
    device: "torch.device",
) -> "DiffusionPipeline":
    """Load what was written as a user of plain diffusers would, into a fresh pipeline."""
    from diffusers import DiffusionPipeline
    from safetensors import SafetensorError

    if config.format == "single_file":
        return load_single_file(family, staging / f"{name}.safetensors", base, device)
    fresh = base.load(device) if config.format in LORA_FORMATS else None
    try:
        if fresh is None:
            fresh = DiffusionPipeline.from_pretrained(staging)  # as people do, plainly
        else:
            file = LORA_FILE if config.format == "diffusers" else f"{name}.safetensors"
            fresh.load_lora_weights(staging, weight_name=file, use_safetensors=True, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, AttributeError, SafetensorError) as error:
        raise ConfigError(
            f"diffusers cannot load what was written as format={config.format}, so nothing was kept: "
            f"{first_sentence(error)}"
        ) from error
    fresh.set_progress_bar_config(disable=True)
    return fresh.to(device)


def _dtype(config: ExportConfig) -> "torch.dtype":
    import torch

    return {"fp16": torch.float16, "fp32": torch.float32}[config.dtype]


def _say_verified(moved: dict[str, float], off: dict[str, float]) -> None:
    say("verified: loaded by diffusers, it computes what the weights of the adapter say:")
    for part, change in moved.items():
        if not change and not off[part]:
            continue  # the adapter is not for it
        unit = " levels of 255" if part == "image" else ""
        say(f"  {part.replace('_', ' ')}: the adapter changes {change:.3g}{unit}, the file differs by {off[part]:.2g}")


def _say_how_to_use(config: ExportConfig, base: Base, name: str) -> None:
    file = config.output_dir / f"{name}.safetensors"
    if config.format == "kohya":
        say(f"kohya: {file}\nComfyUI: copy it to models/loras; A1111 and Forge: to models/Lora, then <lora:{name}:1>")
    elif config.format == "single_file":
        say(
            f"single_file: {file}\nComfyUI: copy it to models/checkpoints; A1111 and Forge: to models/Stable-diffusion"
        )
    else:
        say(f"{config.format}: {config.output_dir}")
    if config.format == "diffusers":
        say("ComfyUI does not know these names; format=kohya writes a file for it, A1111 and Forge")
    if config.format != "merged":
        path = config.output_dir / LORA_FILE if config.format == "diffusers" else file
        line = command("export", {key: value for key, value in asdict(base).items() if value is not None})
        say(f"next: {line.replace('export', f'export --check {shlex.quote(str(path))}', 1)}")
