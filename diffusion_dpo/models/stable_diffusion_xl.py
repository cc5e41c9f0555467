"""Stable Diffusion XL (arXiv 2307.01952): base, Turbo (with `weighting.num_timesteps`), and their descendants.

A distilled model such as SDXL-Turbo is asked at a few noise levels only, and is trained on those alone, noised by its
own schedule, from whose last level it also draws. The code of Diffusion-DPO first rescales that schedule to end in
pure noise; a model that predicts the noise learns nothing there, since what it is given is what it should predict, for
the chosen and the rejected image alike.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from diffusion_dpo.models.unet_diffusion import LoadedUNet, UNetDiffusion

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class StableDiffusionXL(UNetDiffusion):
    """A Stable Diffusion XL pipeline."""

    pipeline_name: ClassVar[str] = "StableDiffusionXLPipeline"

    pretrained: str = "stabilityai/stable-diffusion-xl-base-1.0"
    """Folder or hub id of a diffusers pipeline, or a single-file checkpoint (.safetensors): SDXL base, Turbo, or one
    made of them; no refiner."""

    def load(self, *, device: "torch.device", dtype: "torch.dtype", seed: int) -> "LoadedStableDiffusionXL":
        """See DiffusionModel."""
        return LoadedStableDiffusionXL(self, self.load_pipeline(device, dtype), dtype, seed)


class LoadedStableDiffusionXL(LoadedUNet):
    """The live model. Its conditioning is that of both text encoders, and each image's size and crop.

    `encoder_hidden_states` (B, tokens, width of both), `text_embeds` (B, width of the second's projection), and
    `time_ids` (B, 6), section 2.2 of the paper.
    """

    def encode_prompts(self, prompts: Sequence[str]) -> dict[str, "Tensor"]:
        """See LoadedModel. The empty prompt is encoded like any other, as the authors of Diffusion-DPO do."""
        import torch

        with torch.no_grad():
            embeds, _, pooled, _ = self.pipeline.encode_prompt(
                list(prompts), device=self.device, do_classifier_free_guidance=False
            )
        return {"encoder_hidden_states": embeds.float(), "text_embeds": pooled.float()}

    def image_conditioning(self, sizes: "Tensor") -> dict[str, "Tensor"]:
        """The sizes as they are: their order is that of the UNet."""
        return {"time_ids": sizes.float()}

    def denoiser_inputs(self, conditioning: dict[str, "Tensor"]) -> dict[str, "Tensor | dict[str, Tensor]"]:
        """See LoadedUNet."""
        added = {name: conditioning[name] for name in ("text_embeds", "time_ids")}
        return {"encoder_hidden_states": conditioning["encoder_hidden_states"], "added_cond_kwargs": added}
