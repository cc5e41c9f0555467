"""What a safetensors file says about itself in its header: kohya's `ss_*` and the `modelspec.*` of Stability AI.

Programs show these, sort files by them, and pick a base model by them. Nothing here depends on the clock or on where
the files lay: the same export is the same bytes.
"""

import hashlib
import json
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusion_dpo.exporting.lora import whole
from diffusion_dpo.models.base import native_side_px

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from torch import Tensor

_HASH = "modelspec.hash_sha256"
_ARCHITECTURES = {"xl": "stable-diffusion-xl-v1-base", "v2": "stable-diffusion-v2", "v1": "stable-diffusion-v1"}
_OPEN_CLIP_WIDTH = 1024


def generation(pipeline: "DiffusionPipeline") -> str:
    """Return `v1`, `v2` or `xl`: which Stable Diffusion a pipeline has the layout of."""
    if "text_encoder_2" in pipeline.components:
        return "xl"
    return "v2" if pipeline.unet.config.cross_attention_dim == _OPEN_CLIP_WIDTH else "v1"


def model_header(pipeline: "DiffusionPipeline", title: str, *, lora: bool) -> dict[str, str]:
    """Return the `modelspec.*` entries (Stability AI's Model Metadata Standard 1.0.0), with a place for the hash."""
    kind = generation(pipeline)
    predicts = pipeline.scheduler.config.get("prediction_type", "epsilon")
    side = native_side_px(pipeline.unet.config.sample_size, pipeline.vae_scale_factor)
    architecture = _ARCHITECTURES[kind]
    if kind == "v2":
        architecture += "-768-v" if predicts == "v_prediction" else "-512"
    layout = "diffusers" if lora else "https://github.com/Stability-AI/generative-models"
    return {
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": architecture + ("/lora" if lora else ""),
        "modelspec.implementation": layout,
        "modelspec.title": title,
        "modelspec.prediction_type": "v" if predicts == "v_prediction" else predicts,
        **({} if side is None else {"modelspec.resolution": f"{side}x{side}"}),
        _HASH: "0x" + "0" * 64,
    }


def kohya_header(
    pipeline: "DiffusionPipeline", ranks: Sequence[int], alphas: Sequence[float], *, name: str, base: str
) -> dict[str, str]:
    """Return the `ss_*` entries of a LoRA; a rank or alpha that differs between layers is "Dynamic"."""
    kind = generation(pipeline)
    predicts_v = pipeline.scheduler.config.get("prediction_type") == "v_prediction"
    version = "sdxl_base_v1-0" if kind == "xl" else f"sd_{kind}" + ("_v" if predicts_v else "")
    return {
        "ss_network_module": "networks.lora",
        "ss_network_dim": _one(ranks),
        "ss_network_alpha": _one([whole(alpha) for alpha in alphas]),
        "ss_base_model_version": version,
        "ss_v2": str(kind == "v2"),
        "ss_output_name": name,
        "ss_sd_model_name": base,
    }


def write_safetensors(path: Path, weights: Mapping[str, "Tensor"], metadata: Mapping[str, str]) -> None:
    """Write a file with its metadata in order, and the hash of all its tensors' bytes where there is a place for it.

    safetensors writes the entries in another order every time, so the header is written again, in as many bytes.
    """
    from safetensors.torch import save_file

    save_file(dict(weights), path, metadata=dict(metadata))
    with path.open("rb+") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        filled = dict(metadata) | ({_HASH: f"0x{digest}"} if _HASH in metadata else {})
        header["__metadata__"] = dict(sorted(filled.items()))
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        assert len(text) <= length
        file.seek(8)
        file.write(text.ljust(length))


def lora_settings(settings: Mapping[str, Any]) -> dict[str, str]:
    """Return the entry that diffusers reads peft's settings from: the only place where its files keep alpha."""
    return {"lora_adapter_metadata": json.dumps(settings, indent=2, sort_keys=True)}


def _one(values: Sequence[Any]) -> str:
    return str(values[0]) if len(set(values)) == 1 else "Dynamic"
