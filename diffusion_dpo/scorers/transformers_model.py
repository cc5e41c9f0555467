"""Models of transformers as judges use them: frozen, complete, in float32; and CLIP's two embeddings."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusion_dpo.config import ConfigError
from diffusion_dpo.scorers.embeddings import PromptEmbeddings

if TYPE_CHECKING:
    import torch
    from PIL import Image
    from torch import Tensor


def load_model(scorer: str, class_name: str, folder: Path, device: "torch.device") -> Any:
    """Load a model by the name of its class in transformers; raises ConfigError where any of its weights is missing.

    float32 is asked for, since transformers 5 would keep the file's dtype; and all weights, since transformers would
    fill in random ones and say so in its log alone.
    """
    import torch
    import transformers

    model_class = getattr(transformers, class_name)
    with _as_config_error(scorer, folder), _quiet():
        model, report = model_class.from_pretrained(
            folder, local_files_only=True, output_loading_info=True, dtype=torch.float32
        )
    if report["missing_keys"]:
        first = sorted(report["missing_keys"])[0]
        raise ConfigError(
            f"scorer {scorer}: {folder} lacks {len(report['missing_keys'])} of the weights of a {class_name}, such as "
            f"{first}; is it the right model?"
        )
    return model.to(device).eval().requires_grad_(False)


def load_processor(scorer: str, folder: Path) -> Any:
    """Load what turns images into pixels; raises ConfigError."""
    from transformers import AutoImageProcessor

    with _as_config_error(scorer, folder), _quiet():
        return AutoImageProcessor.from_pretrained(folder, local_files_only=True)


def load_tokenizer(scorer: str, folder: Path) -> Any:
    """Load what turns prompts into tokens; raises ConfigError."""
    from transformers import AutoTokenizer

    with _as_config_error(scorer, folder), _quiet():
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)


@dataclass(frozen=True)
class ClipVision:
    """The image side of a `CLIPModel`.

    Its parts are called one by one: `get_image_features` returns a tensor in transformers 4, and something else in 5.
    """

    model: Any
    processor: Any

    def embed(self, images: "list[Image.Image]") -> "Tensor":
        """Return float32 vectors of length 1, (B, D)."""
        from torch.nn.functional import normalize

        pixels = self.processor(images=images, return_tensors="pt")["pixel_values"]
        pooled = self.model.vision_model(pixel_values=pixels.to(self.model.device)).pooler_output
        return normalize(self.model.visual_projection(pooled))


@dataclass(frozen=True)
class ClipText:
    """The text side of a `CLIPModel`."""

    model: Any
    tokenizer: Any

    @property
    def length(self) -> int:
        """How many tokens it reads."""
        return self.model.config.text_config.max_position_embeddings

    def prompts(self) -> PromptEmbeddings:
        """Return what embeds prompts; too long ones are cut by the tokenizer, which keeps the end token."""
        return PromptEmbeddings(self._embed, self.length)

    def _embed(self, prompts: list[str]) -> "tuple[Tensor, int]":
        from torch.nn.functional import normalize

        tokens = self.tokenizer(
            prompts, padding="max_length", truncation=True, max_length=self.length, return_tensors="pt"
        ).to(self.model.device)
        longer = self.tokenizer(prompts, truncation=True, max_length=self.length + 1)["input_ids"]
        pooled = self.model.text_model(
            input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]
        ).pooler_output
        return normalize(self.model.text_projection(pooled)), sum(len(ids) > self.length for ids in longer)


@contextmanager
def _as_config_error(scorer: str, folder: Path) -> Iterator[None]:
    from pickle import UnpicklingError

    from safetensors import SafetensorError

    try:
        yield
    except (OSError, RuntimeError, ValueError, LookupError, TypeError, SafetensorError, UnpicklingError) as error:
        raise ConfigError(
            f"scorer {scorer} cannot load {folder}: {' '.join(str(error).split())[:300]}; is it the right model, and "
            "complete?"
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence transformers while it loads: what is missing we say ourselves, and what is left over does not matter."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
