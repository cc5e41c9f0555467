"""What a safetensors file says about itself in its header: kohya's `ss_*` and the `modelspec.*` of Stability AI.

Programs show these, sort files by them, and pick a base model by them. Nothing here depends on the clock or on where
the files lay: the same export is the same bytes.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from diffusion_dpo.exporting.lora import whole
from diffusion_dpo.models.base_facts import native_side_px
from diffusion_dpo.models.safetensors_file import HASH

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

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
        HASH: "0x" + "0" * 64,
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


def _one(values: Sequence[Any]) -> str:
    return str(values[0]) if len(set(values)) == 1 else "Dynamic"
