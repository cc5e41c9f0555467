"""Stable Diffusion 1.x and 2.x, whatever they predict."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from diffusion_dpo.models.unet_diffusion import LoadedUNet, UNetDiffusion

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class StableDiffusion(UNetDiffusion):
    """A Stable Diffusion 1.x / 2.x pipeline."""

    pipeline_name: ClassVar[str] = "StableDiffusionPipeline"

    pretrained: str = "pocket"
    """Folder or hub id of a diffusers pipeline, or a single-file checkpoint (.safetensors); `pocket` is the small
    model that comes with the package."""

    def load(self, *, device: "torch.device", dtype: "torch.dtype", seed: int) -> "LoadedStableDiffusion":
        """See DiffusionModel."""
        return LoadedStableDiffusion(self, self.load_pipeline(device, dtype), dtype, seed)


class LoadedStableDiffusion(LoadedUNet):
    """The live model. Its conditioning is `encoder_hidden_states`, (B, tokens, width)."""

    def encode_prompts(self, prompts: Sequence[str]) -> dict[str, "Tensor"]:
        """See LoadedModel."""
        import torch

        with torch.no_grad():
            embeds, _ = self.pipeline.encode_prompt(list(prompts), self.device, 1, do_classifier_free_guidance=False)
        return {"encoder_hidden_states": embeds.float()}
