"""CLIP as a judge, through open_clip: how well an image fits its prompt, or how much it is like its references.

Both numbers are the raw cosine of two embeddings (Radford et al. 2021, arXiv 2103.00020), as in CLIP-T and CLIP-I of
DreamBooth (arXiv 2208.12242): not 100 times it, and not 2.5 max(cos, 0) as in CLIPScore.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Self

from pydantic import Field, PrivateAttr, model_validator

from diffusion_dpo.config import ConfigError
from diffusion_dpo.console import warn
from diffusion_dpo.scorers import Metric, Need, Scorer, ScoreRequest, Scores
from diffusion_dpo.scorers.clip_weights import is_self_contained, locate, open_clip_name
from diffusion_dpo.scorers.weights import content_hash

if TYPE_CHECKING:
    import torch
    from open_clip import CLIP, CustomTextCLIP
    from PIL import Image
    from torch import Tensor

VERSION = 2
"""Raise it when a change of this file changes the values."""
_MAX_CACHED_PROMPTS = 4096


class Clip(Scorer):
    """Cosine of CLIP embeddings: of image and prompt (`clip_text`), or of image and references (`clip_image`)."""

    licence = "that of the weights: MIT for most of OpenAI's and LAION's; the pocket CLIP has this package's"
    source = "Radford et al. 2021, arXiv 2103.00020"
    weights = "an open_clip model: the pocket CLIP (in the package), a folder, a hub id, or a tag"

    model: str = "pocket"
    """`pocket` (comes with the package), `local-dir:/path` (open_clip_config.json beside weights), `hf-hub:org/name`,
    or the name of an open_clip architecture together with `pretrained`."""
    pretrained: str | None = None
    """Weights for an architecture name: an open_clip tag such as laion2b_s34b_b79k, or a weights file."""
    mode: Literal["text", "image"] = "text"
    """text: the image against its prompt. image: the image against each of its references, averaged."""
    name: str = Field("", pattern=r"^[a-z0-9_]*$")
    """Ending of the metric's name, so that two CLIPs can stand side by side: `l14` gives clip_text_l14."""

    _live: "_LiveClip | None" = PrivateAttr(None)

    @model_validator(mode="after")
    def _weights_are_named(self) -> Self:
        if is_self_contained(self.model) and self.pretrained is not None:
            raise ValueError(f"pretrained goes with an architecture name; model={self.model} brings its own weights")
        if not is_self_contained(self.model) and self.pretrained is None:
            raise ValueError(
                f"model={self.model} is an architecture without weights: set pretrained to an open_clip tag or a "
                "file, or model to pocket, local-dir:/path or hf-hub:org/name"
            )
        return self

    @property
    def needs(self) -> frozenset[Need]:
        """The prompt or the references, by `mode`."""
        return frozenset({"prompt"}) if self.mode == "text" else frozenset({"reference"})

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """`clip_text` or `clip_image`, by `mode`, ending in `name`."""
        name = f"clip_{self.mode}" + (f"_{self.name}" if self.name else "")
        return (Metric(name, higher_is_better=True, range=(-1.0, 1.0)),)

    def fingerprint(self) -> str:
        """Hash the mode, the version of the code, the architecture, its preprocessing and the bytes of its files."""
        import open_clip

        decides = [str(VERSION), open_clip.__version__, self.mode, content_hash(locate(self.model, self.pretrained))]
        if not is_self_contained(self.model):
            decides += [self.model, str(open_clip.get_pretrained_cfg(self.model, self.pretrained))]
        return f"clip-{VERSION}-{hashlib.sha256(' '.join(decides).encode()).hexdigest()[:16]}"

    def load(self, device: "torch.device") -> None:
        """Load model, preprocessing and tokenizer in float32; raises ConfigError rather than score without weights."""
        from pickle import UnpicklingError

        import open_clip
        from safetensors import SafetensorError

        locate(self.model, self.pretrained)
        name = open_clip_name(self.model)
        try:
            clip, preprocess = open_clip.create_model_from_pretrained(name, self.pretrained, device=device)
            tokenizer = open_clip.get_tokenizer(name)
        except (OSError, RuntimeError, ValueError, LookupError, SafetensorError, UnpicklingError) as error:
            raise ConfigError(
                f"scorer clip cannot load {self.pretrained or self.model}: {' '.join(str(error).split())[:300]}"
            ) from error
        self._live = _LiveClip(clip.eval().requires_grad_(False), preprocess, tokenizer, device)

    def score(self, batch: Sequence[ScoreRequest]) -> Scores:
        """Return the cosine of each image with its prompt, or the mean of those with its references.

        The pocket CLIP knows the captions of its world alone: NaN, with the reason, for any other prompt.
        """
        import torch

        from diffusion_dpo.pocket.world import parse_caption

        assert self._live is not None, "load() comes before score()"
        reasons = [""] * len(batch)
        if self.model == "pocket" and self.mode == "text":
            reasons = [
                "" if parse_caption(request.prompt) else "the prompt is not a caption of the pocket world"
                for request in batch
            ]
        with torch.inference_mode():
            images = self._live.encode_images([request.image for request in batch])
            if self.mode == "text":
                others = self._live.encode_prompts([request.prompt for request in batch])
            else:
                references = [reference for request in batch for reference in request.references]
                counts = [len(request.references) for request in batch]
                parts = self._live.encode_images(references).split(counts)
                others = torch.stack([part.mean(0) for part in parts])  # the mean of cosines is linear in them
            cosines = (images * others).sum(1).double().cpu().numpy()
        cosines[[bool(reason) for reason in reasons]] = float("nan")
        return Scores({self.metrics[0].name: cosines}, tuple(reasons))


@dataclass
class _LiveClip:
    """A loaded model. Embeddings are float32 of length 1, shape (B, D)."""

    model: "CLIP | CustomTextCLIP"
    preprocess: "Callable[[Image.Image], Tensor]"
    tokenizer: "Callable[..., Tensor]"
    device: "torch.device"
    prompts: "dict[str, Tensor]" = field(default_factory=dict)
    """Embeddings of prompts seen lately: the candidates of one prompt come one after the other."""

    def encode_images(self, images: "Sequence[Image.Image]") -> "Tensor":
        """Encode images; an object that comes several times (a reference) is encoded once."""
        import torch

        unique = {id(image): image for image in images}
        pixels = torch.stack([self.preprocess(image) for image in unique.values()]).to(self.device)
        place = {key: i for i, key in enumerate(unique)}
        return self.model.encode_image(pixels, normalize=True)[[place[id(image)] for image in images]]

    def encode_prompts(self, prompts: Sequence[str]) -> "Tensor":
        """Encode prompts, each of them once."""
        import torch

        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self.prompts]
        if len(self.prompts) + len(new) > _MAX_CACHED_PROMPTS:
            self.prompts.clear()
            new = list(dict.fromkeys(prompts))
        if new:
            embeddings = self.model.encode_text(self._tokenize(new).to(self.device), normalize=True)
            self.prompts.update(zip(new, embeddings, strict=True))
        return torch.stack([self.prompts[prompt] for prompt in prompts])

    def _tokenize(self, prompts: list[str]) -> "Tensor":
        """Return token ids; what is too long is cut by the tokenizer, which keeps the end token that CLIP pools at."""
        tokens = self.tokenizer(prompts)
        length = tokens.shape[1]
        cut = int((self.tokenizer(prompts, context_length=length + 1)[:, :length] != tokens).any(1).sum())
        if cut:
            warn(
                f"{cut} of {len(prompts)} prompts are longer than CLIP's {length} tokens; only their beginning counts"
            )
        return tokens
