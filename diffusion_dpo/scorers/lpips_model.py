"""The network of LPIPS (Zhang et al. 2018, arXiv 1801.03924), with a trunk that is checked and never downloaded.

The `lpips` package would fetch the trunk by itself, as a pickle. Here its heads come from the package and the trunk
from a file of torchvision that is already there.
"""

import hashlib
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, PrivateAttr

from diffusion_dpo.config import ConfigError
from diffusion_dpo.scorers import Scorer
from diffusion_dpo.scorers.weights import Weights, load_tensors, sha256_of

if TYPE_CHECKING:
    import torch
    from PIL import Image
    from torch import Tensor

VERSION = 1
"""Raise it when a change of the code changes the values."""
_TRUNKS = {
    "alex": "alexnet-owt-7be5be79.pth",
    "vgg": "vgg16-397923af.pth",
    "squeeze": "squeezenet1_1-b8a52dc0.pth",
}
"""torchvision's files; the end of each name is the beginning of its sha256."""


class LpipsScorer(Scorer):
    """What the judges by LPIPS have in common: which network it is, at which size, and how it is loaded."""

    licence = "BSD-2-Clause (the heads, in the package lpips), BSD-3-Clause (torchvision's trunks)"
    source = "Zhang et al. 2018, arXiv 1801.03924"
    weights = "torchvision's trunk: alexnet (244 MB), vgg16 (553 MB) or squeezenet1_1 (5 MB)"

    net: Literal["alex", "vgg", "squeeze"] = "alex"
    """The trunk, which is part of the metric's name. alex agrees best with people, by the authors."""
    resolution_px: int = Field(256, ge=64, le=2048)
    """Both images are squashed to a square of this side, since the distance depends on it."""
    trunk_path: Path | None = None
    """torchvision's file of the trunk; null takes it from the cache of torch hub (TORCH_HOME)."""
    trunk_sha256: str | None = Field(None, pattern="^[0-9a-f]{8,64}$")
    """Hash of the file, or its first 8 digits at least, for a trunk of your own; null wants the official one."""

    _model: "LpipsModel | None" = PrivateAttr(None)

    @property
    def lineage(self) -> frozenset[str]:
        """See Scorer."""
        return frozenset({f"backbone: {self.net}", "data: BAPPS"})

    def fingerprint(self) -> str:
        """Hash the versions of code and heads, the net, the size, and the trunk."""
        decides = f"{version('lpips')} {self.net} {self.resolution_px} {self._checked_trunk()[1]}"
        return f"{type(self).__name__.lower()}-{VERSION}-{hashlib.sha256(decides.encode()).hexdigest()[:16]}"

    def load(self, device: "torch.device") -> None:
        """Load trunk and heads; raises ConfigError where the trunk is missing or not the one that was named."""
        import lpips

        file, _ = self._checked_trunk()
        trunk = load_tensors(file, self.type)
        with warnings.catch_warnings():  # lpips asks torchvision in its old words
            warnings.simplefilter("ignore")
            net = lpips.LPIPS(net=self.net, pnet_rand=True, verbose=False)
        names = {name: re.sub(r"^slice\d+\.", "features.", name) for name in net.net.state_dict()}
        lacking = sorted(set(names.values()) - trunk.keys())
        try:
            if lacking:
                raise RuntimeError(f"it lacks {lacking[0]}")
            net.net.load_state_dict({name: trunk[there] for name, there in names.items()})
        except RuntimeError as error:
            raise ConfigError(
                f"scorer {self.type}: {file} is no trunk for net={self.net}: {' '.join(str(error).split())[:200]}"
            ) from error
        self._model = LpipsModel(net.to(device).eval().requires_grad_(False), self.resolution_px, device)

    def _checked_trunk(self) -> tuple[Path, str]:
        """Return the trunk's file and its sha256; raises ConfigError where it is missing or another one."""
        name = _TRUNKS[self.net]
        folder = _hub_folder()
        file = self.trunk_path or folder / name
        if not file.is_file():
            page = f"https://download.pytorch.org/models/{name}"
            raise Weights(self.type, str(file), None, page, "BSD-3-Clause").missing(f"there is no file {file}", folder)
        wanted = self.trunk_sha256 or Path(name).stem.rpartition("-")[2]
        found = sha256_of(file)
        if not found.startswith(wanted):
            raise ConfigError(
                f"scorer {self.type}: the sha256 of {file} is {found[:16]}..., and that of {name} begins with "
                f"{wanted}; download it again, or set trunk_sha256 for a trunk of your own"
            )
        return file, found


@dataclass(frozen=True)
class LpipsModel:
    """A loaded network. Distances are float32, 0 for equal images."""

    net: Any
    resolution_px: int
    device: "torch.device"

    def distances(self, images: "Sequence[Image.Image]", pairs: Sequence[tuple[int, int]]) -> "Tensor":
        """Return the distance of each pair of places in `images`, shape (len(pairs),); each image is seen once."""
        import torch

        if not pairs:
            return torch.empty(0, device=self.device)
        features = self._features(images)
        left, right = torch.tensor(pairs, device=self.device).unbind(1)
        total = torch.zeros(len(pairs), device=self.device)
        for layer, head in zip(features, self.net.lins, strict=True):
            for start in range(0, len(pairs), 16):  # a layer of vgg takes 17 MB a pair
                part = slice(start, start + 16)
                total[part] += head((layer[left[part]] - layer[right[part]]) ** 2).mean((1, 2, 3))
        return total

    def _features(self, images: "Sequence[Image.Image]") -> "list[Tensor]":
        """Return for each layer the activations (B, C, h, w), of length 1 over the channels."""
        import lpips
        import torch

        pixels = torch.stack([self._pixels(image) for image in images]).to(self.device)
        return [lpips.normalize_tensor(layer) for layer in self.net.net(self.net.scaling_layer(pixels))]

    def _pixels(self, image: "Image.Image") -> "Tensor":
        """Return an image as float32 (3, resolution, resolution) in [-1, 1], which LPIPS wants and never checks."""
        import numpy as np
        import torch

        small = image.convert("RGB").resize((self.resolution_px, self.resolution_px))  # bicubic, antialiased
        return torch.from_numpy(np.asarray(small, np.float32) / 127.5 - 1).permute(2, 0, 1)


def _hub_folder() -> Path:
    """The folder of torch hub's downloads, as `torch.hub.get_dir` finds it; a rerun should not wait for torch."""
    import os

    cache = os.environ.get("XDG_CACHE_HOME", "~/.cache")
    home = Path(os.environ.get("TORCH_HOME", Path(cache) / "torch")).expanduser()
    return home / "hub" / "checkpoints"
