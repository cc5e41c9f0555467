"""What judges that embed have in common: each image and each prompt is embedded once, and cosines to references."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from diffusion_dpo.console import warn
from diffusion_dpo.scorers import ScoreRequest

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

_MAX_CACHED_PROMPTS = 4096


def embed_once(images: "Sequence[Image.Image]", embed: "Callable[[list[Image.Image]], Tensor]") -> "Tensor":
    """Return embeddings (B, D) of B images; an object that comes several times (a reference) is embedded once."""
    unique = {id(image): image for image in images}
    place = {key: i for i, key in enumerate(unique)}
    return embed(list(unique.values()))[[place[id(image)] for image in images]]


def cosines_to_references(batch: Sequence[ScoreRequest], embed: "Callable[[list[Image.Image]], Tensor]") -> np.ndarray:
    """Return the mean cosine of each image with its references, float64 (B,); `embed` gives vectors of length 1."""
    import torch

    references = [reference for request in batch for reference in request.references]
    vectors = embed_once([*(request.image for request in batch), *references], embed)
    parts = vectors[len(batch) :].split([len(request.references) for request in batch])
    means = torch.stack([part.mean(0) for part in parts])  # the mean of cosines is linear in them
    return (vectors[: len(batch)] * means).sum(1).double().cpu().numpy()


class PromptEmbeddings:
    """Embeds prompts and remembers them: the candidates of one prompt come one after the other."""

    def __init__(self, embed: "Callable[[list[str]], tuple[Tensor, int]]", length: int) -> None:
        """`embed` returns vectors (B, D) and how many prompts it had to cut to `length` tokens."""
        self._embed = embed
        self._length = length
        self._known: dict[str, Tensor] = {}
        self._has_warned = False

    def __call__(self, prompts: Sequence[str]) -> "Tensor":
        """Return the vectors of prompts, (B, D); says once that some are too long."""
        import torch

        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._known]
        if len(self._known) + len(new) > _MAX_CACHED_PROMPTS:
            self._known.clear()
            new = list(dict.fromkeys(prompts))
        if new:
            vectors, num_cut = self._embed(new)
            self._known.update(zip(new, vectors, strict=True))
            if num_cut and not self._has_warned:
                self._has_warned = True
                same = len(new) - len({vector.numpy(force=True).tobytes() for vector in vectors})
                warn(
                    f"{num_cut} of {len(new)} prompts are longer than the model's {self._length} tokens; only their "
                    "beginning counts, here and later on"
                    + (f", so that {same} of them repeat another one to this judge" if same else "")
                )
        return torch.stack([self._known[prompt] for prompt in prompts])
