"""A CLIP of open_clip, loaded: what turns images and prompts into vectors of length 1."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from diffusion_dpo.config import ConfigError
from diffusion_dpo.scorers.embeddings import PromptEmbeddings

if TYPE_CHECKING:
    import torch
    from open_clip import CLIP, CustomTextCLIP
    from PIL import Image
    from torch import Tensor


@dataclass(frozen=True)
class OpenClip:
    """A frozen model in float32 and eval mode, with its preprocessing and its tokenizer."""

    model: "CLIP | CustomTextCLIP"
    preprocess: "Callable[[Image.Image], Tensor]"
    tokenizer: "Callable[..., Tensor]"
    device: "torch.device"

    def embed_images(self, images: "list[Image.Image]") -> "Tensor":
        """Return float32 vectors of length 1, (B, D)."""
        import torch

        pixels = torch.stack([self.preprocess(image) for image in images]).to(self.device)
        return self.model.encode_image(pixels, normalize=True)

    def prompts(self) -> PromptEmbeddings:
        """Return what embeds prompts; too long ones are cut by the tokenizer, which keeps the end token."""
        return PromptEmbeddings(self._embed_prompts, self.tokenizer(["a"]).shape[1])

    def _embed_prompts(self, prompts: list[str]) -> "tuple[Tensor, int]":
        tokens = self.tokenizer(prompts)
        length = tokens.shape[1]
        num_cut = int((self.tokenizer(prompts, context_length=length + 1)[:, :length] != tokens).any(1).sum())
        return self.model.encode_text(tokens.to(self.device), normalize=True), num_cut


def load_open_clip(
    scorer: str,
    name: str,
    pretrained: str | None,
    device: "torch.device",
    *,
    resize_mode: Literal["shortest", "longest", "squash"] | None = None,
    preprocessing: Mapping[str, Any] | None = None,
) -> OpenClip:
    """Load a model by open_clip's name for it; raises ConfigError rather than go on with random weights.

    `resize_mode` and, of `preprocessing`, `mean`, `std`, `interpolation` and `resize_mode` take the place of the
    model's own, which are lost where the weights come from a file.
    """
    from pickle import UnpicklingError

    import open_clip
    from safetensors import SafetensorError

    own = preprocessing or {}
    try:
        model, preprocess = open_clip.create_model_from_pretrained(
            name,
            pretrained,
            device=device,
            image_mean=own.get("mean"),
            image_std=own.get("std"),
            image_interpolation=own.get("interpolation"),
            image_resize_mode=resize_mode or own.get("resize_mode"),
        )
        tokenizer = open_clip.get_tokenizer(name)
    except (
        *(OSError, RuntimeError, ValueError, LookupError, SafetensorError, UnpicklingError),
        AssertionError,  # open_clip's own, for weights of another architecture
    ) as error:
        raise ConfigError(
            f"scorer {scorer} cannot load {pretrained or name}: {' '.join(str(error).split())[:300]}"
        ) from error
    return OpenClip(model.eval().requires_grad_(False), preprocess, tokenizer, device)
