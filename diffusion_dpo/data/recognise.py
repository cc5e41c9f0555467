"""What a path holds: pairs of one kind or another, or candidates."""

from collections import Counter
from pathlib import Path

from diffusion_dpo.config import ConfigError
from diffusion_dpo.data import PairSource
from diffusion_dpo.data.candidates import IMAGE_SUFFIXES
from diffusion_dpo.data.folder import EXAMPLE, METADATA, FolderData, read_metadata
from diffusion_dpo.data.labelled import EXAMPLE as LABELLED_EXAMPLE
from diffusion_dpo.data.labelled import KEYS as LABELLED_KEYS
from diffusion_dpo.data.labelled import LabelledData
from diffusion_dpo.data.pairs import PairsData
from diffusion_dpo.data.pickapic import PickapicData
from diffusion_dpo.data.shards import column_names

_EXPECTED = f"""Expected is one of
  a folder with {METADATA} and image files, one line per pair, such as {EXAMPLE}
  Parquet with the columns prompt, chosen, rejected (images as bytes): pairs
  the same with image and label (true: liked) instead of chosen and rejected: labelled images
  Parquet with the columns caption, jpg_0, jpg_1, label_0: Pick-a-Pic
  Parquet with the column image, or a folder of image files: candidates
Anything else that `train` reads is named as there: diffusion-dpo inspect data.type=hpdv3 data.path=..."""


def recognise(path: Path) -> PairSource | None:
    """Return the pairs that a path holds, None for candidates; ConfigError, saying what is there, for neither."""
    if not path.exists():
        raise ConfigError(f"there is no file or folder {path}; name one")
    if (path / METADATA).is_file():
        lines = read_metadata(path, LABELLED_KEYS, LABELLED_EXAMPLE)
        if any(isinstance(entry, dict) for _, entry in lines):
            return LabelledData(path=path, type="labelled")
        return FolderData(path=path, type="folder")
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    parquet = [file for file in files if file.suffix == ".parquet" and not file.name.startswith("scores-")]
    if parquet:
        names = set(column_names(parquet[0]))
        if names >= {"prompt", "chosen", "rejected"}:
            return PairsData(path=path, type="pairs")
        if names >= {"caption", "jpg_0", "jpg_1", "label_0"}:
            return PickapicData(path=path, type="pickapic", ties="keep")
        if names >= set(LABELLED_KEYS):
            return LabelledData(path=path, type="labelled")
        if "image" in names:
            return None
        raise ConfigError(
            f"{parquet[0]} has the columns {', '.join(sorted(names))}, which are not ours; train on them with "
            f"data.type=hub data.path={path} data.prompt_column=... (see `diffusion-dpo train --help`).\n{_EXPECTED}"
        )
    if any(file.suffix.lower() in IMAGE_SUFFIXES for file in files):
        return None
    found = Counter(file.suffix.lower() or "no extension" for file in files)
    counts = ", ".join(f"{count} x {suffix}" for suffix, count in found.most_common(8)) or "no files at all"
    raise ConfigError(f"nothing to inspect in {path.resolve()}: it holds {counts}.\n{_EXPECTED}")
