"""What a model computes, measured at a few points, so that two models can be told apart by numbers.

The UNet is asked directly, at a few noise levels and with the base's own text embeddings, so that its answer does not
depend on the text encoders; they are asked for themselves; and one image is drawn by everything together.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from diffusion_dpo.config import ConfigError
from diffusion_dpo.models.base_facts import native_side_px
from diffusion_dpo.sampling import DrawRequest, draw
from diffusion_dpo.settings import Sampling

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from torch import Tensor

PROMPTS = ("a red fox", "old man")
_NOISE_LEVELS = (0.1, 0.5, 0.9)
_MAX_SIDE_PX = 256
_ROUNDING = 2e-6
"""Relative difference that the order of sums makes in float32."""
_NOTHING = 10 * _ROUNDING
"""Relative change below which an adapter does nothing: less could not be told from rounding."""

Answers = Mapping[str, "Tensor"]
"""What each part said, float32 on the CPU: `unet`, `text_encoder`, `text_encoder_2`, and `image` in [0, 255]."""


@dataclass(frozen=True)
class Probe:
    """The questions; made once from the base and put to every model."""

    latents: "Tensor"
    timesteps: "Tensor"
    conditioning: Mapping[str, Any]
    side_px: int

    @classmethod
    def of(cls, pipeline: "DiffusionPipeline") -> "Probe":
        """Return questions for the family and size of a pipeline that has no adapter."""
        import torch

        side = min(
            native_side_px(pipeline.unet.config.sample_size, pipeline.vae_scale_factor) or _MAX_SIDE_PX, _MAX_SIDE_PX
        )
        count = len(_NOISE_LEVELS)
        width = side // pipeline.vae_scale_factor
        shape = (count, pipeline.unet.config.in_channels, width, width)
        latents = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        last = pipeline.scheduler.config.num_train_timesteps - 1
        encoded = _encode(pipeline, [PROMPTS[i % len(PROMPTS)] for i in range(count)])
        conditioning: dict[str, Any] = {"encoder_hidden_states": encoded[0]}
        if pipeline.unet.config.addition_embed_type == "text_time":
            sizes = torch.tensor([[side, side, 0, 0, side, side]] * count, dtype=torch.float32)
            conditioning["added_cond_kwargs"] = {"text_embeds": encoded[1], "time_ids": sizes}
        return cls(latents, torch.tensor([round(level * last) for level in _NOISE_LEVELS]), conditioning, side)

    def ask(self, pipeline: "DiffusionPipeline") -> dict[str, "Tensor"]:
        """Return a pipeline's answers; it computes in its own number format. Raises ConfigError where one is NaN."""
        import torch

        with torch.backends.cudnn.flags(allow_tf32=False):  # which rounds as much as a small adapter changes
            answers = self._ask(pipeline)
        for part, answer in answers.items():
            if not answer.isfinite().all():
                raise ConfigError(f"the {part.replace('_', ' ')} computes NaN or infinity: its weights are broken")
        return answers

    def _ask(self, pipeline: "DiffusionPipeline") -> dict[str, "Tensor"]:
        import numpy as np
        import torch

        device, dtype = pipeline.device, pipeline.unet.dtype
        conditioning = _moved(self.conditioning, device, dtype)
        with torch.no_grad():
            said = pipeline.unet(self.latents.to(device, dtype), self.timesteps.to(device), **conditioning).sample
        answers = {"unet": said.float().cpu()}
        for part, output in zip(("text_encoder", "text_encoder_2"), _hidden_states(pipeline), strict=False):
            answers[part] = output.float().cpu()
        sampling = Sampling(num_inference_steps=3, guidance_scale=3.0, resolution_px=self.side_px, batch_size=1)
        (image,) = draw(pipeline, [DrawRequest(PROMPTS[0], seed=0)], sampling)
        answers["image"] = torch.from_numpy(np.asarray(image, dtype=np.float32))
        return answers


def changes(before: Answers, after: Answers) -> dict[str, float]:
    """Return by how much each part's answer moved: the root mean square of the difference over that of `before`.

    Of the image it is the mean difference in levels of 255 instead.
    """
    moved = {}
    for part, old in before.items():
        difference = after[part] - old
        if part == "image":
            moved[part] = float(difference.abs().mean())
        else:
            moved[part] = float(difference.pow(2).mean().sqrt() / old.pow(2).mean().sqrt().clamp_min(1e-12))
    return moved


def networks_changed(moved: Mapping[str, float]) -> list[str]:
    """Return the networks that changed by so much that losing the change would be seen."""
    return [part for part, change in moved.items() if part != "image" and change > _NOTHING]


def does_something(moved: Mapping[str, float]) -> bool:
    """Whether one of the networks did."""
    return bool(networks_changed(moved))


def difference(base: Answers, expected: Answers, found: Answers, *, tolerance: float) -> str | None:
    """Return in words where `found` is not `expected`, None where it is.

    A network may be off by `tolerance` of what the adapter changes in it, and by rounding; the image by that and by
    one level of 255.
    """
    effect, error = changes(base, expected), changes(expected, found)
    for part, off in error.items():
        allowed = tolerated(part, effect[part], tolerance)
        if not off <= allowed:  # NaN, too
            unit = "levels of 255" if part == "image" else "of its output"
            share = f", {off / effect[part]:.0%} of what the adapter changes" if effect[part] > _NOTHING else ""
            return f"the {part.replace('_', ' ')} is off by {off:.2g} {unit}{share}; {allowed:.2g} is allowed"
    return None


def tolerated(part: str, effect: float, tolerance: float) -> float:
    """Return by how much a part's answer may be off, where the adapter changes it by `effect`."""
    return tolerance * effect + (1.0 if part == "image" else _ROUNDING)


def _encode(pipeline: "DiffusionPipeline", prompts: list[str]) -> tuple[Any, Any]:
    """Return text embeddings, and SDXL's pooled ones, on the CPU in float32."""
    import torch

    with torch.no_grad():
        encoded = pipeline.encode_prompt(
            prompts, device=pipeline.device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
    return encoded[0].float().cpu(), (encoded[2].float().cpu() if len(encoded) > 2 else None)


def _hidden_states(pipeline: "DiffusionPipeline") -> list["Tensor"]:
    import torch

    outputs = []
    for suffix in ("", "_2"):
        encoder = pipeline.components.get(f"text_encoder{suffix}")
        if encoder is not None:
            tokens = pipeline.components[f"tokenizer{suffix}"](
                list(PROMPTS), padding="max_length", truncation=True, return_tensors="pt"
            ).input_ids
            with torch.no_grad():
                output = encoder(tokens.to(encoder.device), output_hidden_states=True)
            outputs.append(torch.cat([state.flatten() for state in output.hidden_states[1:]]))
    return outputs


def _moved(value: Any, device: Any, dtype: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _moved(inner, device, dtype) for key, inner in value.items()}
    return value.to(device, dtype)
