"""What `compare` is made of: who takes part, images that are drawn once, judges, and the signs of reward hacking."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from diffusion_dpo.data.candidates import Unit
from diffusion_dpo.data.prompts import Prompt
from diffusion_dpo.files import shown
from diffusion_dpo.report import BASELINE
from diffusion_dpo.settings import ImageModel


@dataclass(frozen=True)
class Compared:
    """One model that takes part."""

    name: str
    model: ImageModel
    weights: str
    """Hash of its local weights, adapter included."""
    adapter: str = ""
    """Hash of its adapter alone."""
    trained_by: Path | None = None
    """The run folder that its adapter is from, if it is from one."""
    step: int | None = None
    """The step of the checkpoint that was asked for."""
    labelled_by: tuple[str, ...] | None = ()
    """Metrics that labelled its training pairs or those of what it started from; None where nothing says."""
    judges_not_known: tuple[str, ...] = ()
    """What it stands on of which nothing says who labelled the pairs."""
    lineage: frozenset[str] = frozenset()
    """Of its training pairs, and of those of what it started from: see PairSource."""
    prompt_hashes: frozenset[str] = frozenset()
    """Of the prompts of all these pairs."""

    @property
    def description(self) -> str:
        """Where it comes from, in words; of an absolute path its last name, since a report is shown to others."""
        text = shown(Path(self.model.pretrained))
        if self.model.adapter_path is not None:
            text += f" with {shown(self.trained_by or self.model.adapter_path)}"
            text += f" after step {self.step}" if self.step is not None else ""
            text += f" at {self.model.adapter_scale:g}" if self.model.adapter_scale != 1 else ""
        return text


@dataclass(frozen=True)
class Wall:
    """All images of a comparison: of every model, the shards of its images, seed after seed, each in prompt order."""

    prompts: tuple[Prompt, ...]
    num_seeds: int
    units: dict[str, list[Unit]]

    def arrange(self, values: list[float]) -> np.ndarray:
        """Return one value an image, in the order of a model's units, as (num_prompts, seeds)."""
        return np.array(values).reshape(self.num_seeds, len(self.prompts)).T

    @property
    def baseline(self) -> list[Unit]:
        """The baseline's shards."""
        return self.units[BASELINE]
