"""`inspect`: what is in a data set or a candidates folder. Looks at everything, changes nothing."""

from pathlib import Path

from rich.table import Table
from rich.text import Text

from diffusion_dpo.config import ConfigError
from diffusion_dpo.console import say, show, warn
from diffusion_dpo.data.contact_sheet import draw_sheet
from diffusion_dpo.data.recognise import recognise_either
from diffusion_dpo.files import atomic_path
from diffusion_dpo.report.data_of_candidates import look_at_candidates
from diffusion_dpo.report.data_of_pairs import look_at_pairs
from diffusion_dpo.report.data_page import Findings, write_page
from diffusion_dpo.settings import InspectConfig

PAGE, SHEET = "inspect.html", "contact-sheet.png"


def run(config: InspectConfig) -> Path:
    """Print what is there; write it as a page, with a contact sheet beside it, and return the path of the page."""
    recognised = recognise_either(config.path, config.data)
    path, source = recognised.path, recognised.source
    if source is None and not recognised.are_candidates:
        say(f"{path} holds {recognised.kind}\n{recognised.advice}")
        return path
    folder = config.output_dir or Path("runs/inspect") / path.resolve().stem
    if folder.resolve().is_relative_to(path.resolve()):
        raise ConfigError(f"output_dir {folder} lies inside {path}, where inspect writes nothing; choose another one")
    if source is None:
        found = look_at_candidates(path, config.num_images, config.prompt_column)
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
    say(f"page: {folder / PAGE}")
    if not found.next_command:
        why = "every row was dropped, for the reasons above; fix the rows" if found.dropped else "it has no rows"
        raise ConfigError(f"nothing of {path} can be used: {why}")
    say(f"next: {found.next_command}")
    return folder / PAGE


def _print(title: str, found: Findings) -> None:
    table = Table(title=Text(title), title_justify="left", show_header=False)
    for name, value in found.rows:
        if value:
            table.add_row(Text(name), Text(value))
    show(table)
    for text in found.warnings:
        warn(text)
