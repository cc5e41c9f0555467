"""The images of a comparison, as `compare` leaves them: each model's beside the baseline's, of the same noise."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from diffusion_dpo.config import ConfigError
from diffusion_dpo.data.candidates import Candidate, Unit
from diffusion_dpo.data.shards import num_rows
from diffusion_dpo.files import read_manifest


@dataclass(frozen=True)
class ComparedPair:
    """One prompt and seed, drawn by the baseline and by another model."""

    prompt: str
    prompt_id: str
    index: int
    """Which of the prompt's seeds, from 0."""
    model: str
    """Name of the other model in the comparison."""
    baseline: Candidate
    other: Candidate


def is_comparison(folder: Path) -> bool:
    """Whether `compare` made a folder."""
    return folder.is_dir() and read_manifest(folder).get("made_by") == "compare"


def read_comparison(folder: Path, *, images: bool = True) -> Iterator[ComparedPair]:
    """Yield the pairs of a finished comparison, model by model; raises ConfigError when it is none or not finished.

    Without `images`, they are read without their pixels.
    """
    manifest = read_manifest(folder)
    if manifest.get("made_by") != "compare" or not manifest.get("complete") or "shards" not in manifest:
        raise ConfigError(f"{folder} is not a finished comparison; run the command that made it again")
    shards: dict[str, list[str]] = manifest["shards"]
    baseline, *others = shards
    for name in others:
        for ours, theirs in zip(shards[baseline], shards[name], strict=True):
            index = int(Path(ours).stem.split("-")[1])
            both = (unit(folder / shard).read(images=images) for shard in (ours, theirs))
            for first, second in zip(*both, strict=True):
                yield ComparedPair(first.prompt, first.prompt_id, index, name, first, second)


def unit(path: Path) -> Unit:
    """Return one shard of images as what is judged as a whole."""
    return Unit(f"{path.parent.name}-{path.stem}", path.parent, (path.name,), num_rows(path))
