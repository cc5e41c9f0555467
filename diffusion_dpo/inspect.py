"""`inspect`: what is in a data set or a candidates folder. Looks at everything, changes nothing."""

from collections import Counter
from pathlib import Path

from rich.table import Table
from rich.text import Text

from diffusion_dpo.config import ConfigError
from diffusion_dpo.console import say, show, warn
from diffusion_dpo.data import PairSource
from diffusion_dpo.data.candidates import IMAGE_SUFFIXES
from diffusion_dpo.data.contact_sheet import draw_sheet
from diffusion_dpo.data.folder import EXAMPLE, METADATA, FolderData, read_metadata
from diffusion_dpo.data.labelled import EXAMPLE as LABELLED_EXAMPLE
from diffusion_dpo.data.labelled import KEYS as LABELLED_KEYS
from diffusion_dpo.data.labelled import LabelledData
from diffusion_dpo.data.pairs import PairsData
from diffusion_dpo.data.pickapic import PickapicData
from diffusion_dpo.data.shards import column_names
from diffusion_dpo.files import atomic_path
from diffusion_dpo.report.data_of_candidates import look_at_candidates
from diffusion_dpo.report.data_of_pairs import look_at_pairs
from diffusion_dpo.report.data_page import Findings, write_page
from diffusion_dpo.settings import InspectConfig

PAGE, SHEET = "inspect.html", "contact-sheet.png"
_EXPECTED = f"""Expected is one of
  a folder with {METADATA} and image files, one line per pair, such as {EXAMPLE}
  Parquet with the columns prompt, chosen, rejected (images as bytes): pairs
  the same with image and label (true: liked) instead of chosen and rejected: labelled images
  Parquet with the columns caption, jpg_0, jpg_1, label_0: Pick-a-Pic
  Parquet with the column image, or a folder of image files: candidates
Anything else that `train` reads is named as there: diffusion-dpo inspect data.type=hpdv3 data.path=..."""


def run(config: InspectConfig) -> Path:
    """Print what is there; write it as a page, with a contact sheet beside it, and return the path of the page."""
    path = config.path.parent if config.path.name == METADATA else config.path
    if config.data is not None:
        path = Path(str(config.data.model_dump().get("path", config.data.type)))
    folder = config.output_dir or Path("runs/inspect") / path.resolve().stem
    if folder.resolve().is_relative_to(path.resolve()):
        raise ConfigError(f"output_dir {folder} lies inside {path}, where inspect writes nothing; choose another one")
    source = config.data or _recognise(path)
    if source is None:
        found = look_at_candidates(path, config.num_images)
    else:
        found = look_at_pairs(path, source, config.num_images)
    _print(str(path), found)
    folder.mkdir(parents=True, exist_ok=True)
    write_page(folder / PAGE, str(path), found)
    blocks = [block for sheet in found.sheets for block in sheet.blocks]
    if blocks:
        with atomic_path(folder / SHEET) as partial:
            draw_sheet(str(path), blocks).save(partial, format="PNG")
        say(f"contact sheet: {folder / SHEET}")
    say(f"page: {folder / PAGE}\nnext: {found.next_command}")
    return folder / PAGE


def _recognise(path: Path) -> PairSource | None:
    """Return the pairs that a path holds, None for candidates; ConfigError, saying what is there, for neither."""
    if not path.exists():
        raise ConfigError(f"there is no file or folder {path}; name one: diffusion-dpo inspect PATH")
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


def _print(title: str, found: Findings) -> None:
    table = Table(title=Text(title), title_justify="left", show_header=False)
    for name, value in found.rows:
        if value:
            table.add_row(Text(name), Text(value))
    show(table)
    for text in found.warnings:
        warn(text)
