"""Images from prompts: one seed per (prompt, index), and the same noise for every model, device and batch."""

import functools
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusion_dpo.config import ConfigError
from diffusion_dpo.data.images import middle_square
from diffusion_dpo.models.adapters import adapter_files, add_adapter, find_adapter
from diffusion_dpo.models.base_facts import require_side_px
from diffusion_dpo.models.lora_write import LORA_FILE
from diffusion_dpo.models.pipeline import POCKET_DIR, load_base
from diffusion_dpo.models.requirements import with_schedule
from diffusion_dpo.settings import ImageModel, Sampling

if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline
    from PIL.Image import Image


@dataclass(frozen=True)
class DrawRequest:
    """One image to draw; `reference` is what image-to-image starts from."""

    prompt: str
    seed: int
    reference: "Image | None" = None


SCHEDULERS = {
    "ddim": "DDIMScheduler",
    "dpm++": "DPMSolverMultistepScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler_ancestral": "EulerAncestralDiscreteScheduler",
    "unipc": "UniPCMultistepScheduler",
}
"""The samplers that can be asked for, and their diffusers class."""


def image_seed(base_seed: int, prompt_id: str, index: int) -> int:
    """Return the seed (63 bits) of the index-th image of a prompt; it does not depend on what else is drawn."""
    digest = hashlib.sha256(json.dumps([base_seed, prompt_id, index]).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def load_pipeline(model: ImageModel, *, device: "torch.device", dtype: "torch.dtype") -> "DiffusionPipeline":
    """Load a pipeline with its adapter, if it has one; raises ConfigError when either cannot be had."""
    if model.adapter_path is not None:
        find_adapter(model.adapter_path)  # before gigabytes are loaded
    pipeline = load_base(
        model.pretrained,
        revision=model.revision,
        variant=model.variant,
        prediction_type=model.prediction_type,
        device=device,
        dtype=dtype,
    )
    if model.adapter_path is not None:
        add_adapter(pipeline, model.adapter_path, scale=model.adapter_scale)
    return pipeline


def weights_hash(model: ImageModel) -> str:
    """Hash the files of a local model and of its adapter: the same path may hold other weights tomorrow."""
    roots = [Path(model.pretrained)] if Path(model.pretrained).exists() else []
    if model.pretrained == "pocket":
        roots = [POCKET_DIR]
    if model.adapter_path is not None:
        roots += adapter_files(model.adapter_path)
    return _hash_of(roots)


def identity_of(model: ImageModel) -> dict[str, Any]:
    """Return what decides what a model draws: its files wherever they lie; of a base on the hub its name."""
    names = {"adapter_path"}
    if model.pretrained == "pocket" or Path(model.pretrained).exists():
        names |= {"pretrained", "revision"}
    return model.model_dump(mode="json", exclude=names) | {"weights": weights_hash(model)}


def adapter_hash(path: Path) -> str:
    """Hash the files of an adapter alone, whatever model it is for."""
    return _hash_of(adapter_files(path))


def _hash_of(roots: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for root in roots:
        files = [root]
        if root.is_dir():
            files = sorted(path for path in root.rglob("*") if path.suffix in (".safetensors", ".json"))
        for file in files:
            name = LORA_FILE if file == root else file.name  # one for all: a file that is renamed is the same
            state = file.stat()
            digest.update(f"{name} {_file_hash(file.resolve(), state.st_size, state.st_mtime_ns)}\n".encode())
    return digest.hexdigest()[:16]


@functools.lru_cache(maxsize=256)
def _file_hash(file: Path, size: int, mtime_ns: int) -> str:
    """Hash a file, once as long as it stays as it is: many models of a comparison share a base of gigabytes."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def make_scheduler(pipeline: "DiffusionPipeline", name: str) -> Any:
    """Return the sampler of a name in SCHEDULERS, on the noise schedule of the pipeline's own."""
    import diffusers

    return with_schedule(getattr(diffusers, SCHEDULERS[name]), pipeline.scheduler)


def draw(
    pipeline: "DiffusionPipeline", requests: Sequence[DrawRequest], sampling: Sampling, strength: float | None = None
) -> list["Image"]:
    """Draw one batch of images (as many as are asked for; the caller keeps to `sampling.batch_size`).

    With a `strength`, in (0, 1], an image starts from its reference at that part of the noise schedule and is denoised
    in that part of the steps (SDEdit, 2108.01073). diffusers then draws the noise from the image's seed, in the number
    format of the pipeline.

    The initial noise of an image is drawn on the CPU in float32 from its own seed, so it is the same whatever the
    model, the device, the precision or the rest of the batch. A half-precision pipeline runs under autocast, as in
    training, since what was tuned of it may be float32; its VAE runs in its own precision, which autocast would take
    from it.
    """
    import torch

    side = resolution_px(pipeline, sampling.resolution_px)
    generators = [torch.Generator().manual_seed(request.seed) for request in requests]
    shape = (pipeline.unet.config.in_channels, side // pipeline.vae_scale_factor, side // pipeline.vae_scale_factor)
    if strength is None:
        noise = torch.stack([torch.randn(shape, generator=generator) for generator in generators])
        call: Any = partial(pipeline, height=side, width=side, latents=noise.to(pipeline.device, pipeline.unet.dtype))
    else:
        latents = torch.cat([_encode(pipeline, request.reference, side) for request in requests])
        call = partial(_image_to_image(pipeline), image=latents, strength=strength)
    guided = sampling.guidance_scale > 1 and sampling.negative_prompt
    precision = pipeline.text_encoder.dtype
    with torch.autocast(pipeline.device.type, precision, enabled=precision != torch.float32):
        output = call(
            [request.prompt for request in requests],
            # none is not the empty one: SDXL pushes away from zeros then
            negative_prompt=[sampling.negative_prompt] * len(requests) if guided else None,
            num_inference_steps=sampling.num_inference_steps,
            guidance_scale=sampling.guidance_scale,
            generator=generators,
            output_type="latent",
        )
    vae = pipeline.vae
    with torch.no_grad():
        images = vae.decode(output.images.to(vae.dtype) / vae.config.scaling_factor, return_dict=False)[0]
    return list(pipeline.image_processor.postprocess(images.float(), output_type="pil"))


def _image_to_image(pipeline: "DiffusionPipeline") -> "DiffusionPipeline":
    """Return the image-to-image pipeline of the same parts."""
    from diffusers import AutoPipelineForImage2Image

    other = AutoPipelineForImage2Image.from_pipe(pipeline)
    other.set_progress_bar_config(disable=True)
    return other


def _encode(pipeline: "DiffusionPipeline", reference: "Image | None", side: int) -> "torch.Tensor":
    """Return the latents (1, C, H, W) of a reference's middle square: the mode, so that encoding adds no chance."""
    import torch
    from PIL.Image import Resampling

    assert reference is not None, "image-to-image needs a reference"
    square = reference.resize((side, side), Resampling.LANCZOS, box=middle_square(reference.size))
    vae = pipeline.vae
    pixels = pipeline.image_processor.preprocess(square).to(pipeline.device, vae.dtype)
    with torch.no_grad():
        encoded = vae.encode(pixels)
        latents: torch.Tensor = encoded.latents if hasattr(encoded, "latents") else encoded.latent_dist.mode()
    return latents * vae.config.scaling_factor


def resolution_px(pipeline: "DiffusionPipeline", asked: int | None) -> int:
    """Return the side of the images in px; raises ConfigError when the model cannot draw that size."""
    side = asked or require_side_px(pipeline.unet.config.sample_size, pipeline.vae_scale_factor)
    if side % pipeline.vae_scale_factor:
        raise ConfigError(f"resolution_px is {side}; this model needs a multiple of {pipeline.vae_scale_factor}")
    return int(side)
