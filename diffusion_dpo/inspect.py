"""`inspect`: what is in a data set or a candidates folder. Looks at everything, changes nothing."""

import math
import shlex
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from rich.table import Table
from rich.text import Text

from diffusion_dpo.config import ConfigError
from diffusion_dpo.console import progress, say, show
from diffusion_dpo.data import Dropped, PairSource
from diffusion_dpo.data.candidates import IMAGE_SUFFIXES, Candidate, Unit, find_units
from diffusion_dpo.data.collect import describe_drops, in_order, survey
from diffusion_dpo.data.contact_sheet import GREEN, GREY, RED, Block, Tile, draw_sheet
from diffusion_dpo.data.folder import EXAMPLE, METADATA, FolderData, read_metadata
from diffusion_dpo.data.images import BrokenImage, decode_rgb, pixel_hash
from diffusion_dpo.data.index import Collected
from diffusion_dpo.data.labelled import EXAMPLE as LABELLED_EXAMPLE
from diffusion_dpo.data.labelled import KEYS as LABELLED_KEYS
from diffusion_dpo.data.labelled import LabelledData
from diffusion_dpo.data.pairs import PairsData
from diffusion_dpo.data.pickapic import PickapicData
from diffusion_dpo.data.scores import Verdict, read_all_verdicts, read_facts
from diffusion_dpo.data.shards import column_names
from diffusion_dpo.files import atomic_path
from diffusion_dpo.settings import InspectConfig

_EXPECTED = f"""Expected is one of
  a folder with {METADATA} and image files, one line per pair, such as {EXAMPLE}
  Parquet with the columns prompt, chosen, rejected (images as bytes): pairs
  the same with image and label (true: liked) instead of chosen and rejected: labelled images
  Parquet with the columns caption, jpg_0, jpg_1, label_0: Pick-a-Pic
  Parquet with the column image, or a folder of image files: candidates"""
_SIZES_SHOWN = 4
_NOTHING = ""

T = TypeVar("T")
_Rows = list[tuple[str, str]]
_Findings = tuple[_Rows, list[Block], str]
"""The lines of the table, the blocks of the contact sheet, and the next command."""


def run(config: InspectConfig) -> Path | None:
    """Print what is there, draw a contact sheet, and return its path (None where there is nothing to draw)."""
    path = config.path.parent if config.path.name == METADATA else config.path
    folder = config.output_dir or Path("runs/inspect") / path.resolve().stem
    if folder.resolve().is_relative_to(path.resolve()):
        raise ConfigError(f"output_dir {folder} lies inside {path}, where inspect writes nothing; choose another one")
    source = _recognise(path)
    if source is None:
        rows, blocks, next_command = _inspect_candidates(path, config.num_images)
    else:
        rows, blocks, next_command = _inspect_pairs(path, source, config.num_images)
    _print(str(path), rows)
    sheet = None
    if blocks:
        sheet = folder / "contact-sheet.png"
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_path(sheet) as partial:
            draw_sheet(str(path), blocks).save(partial, format="PNG")
        say(f"contact sheet: {sheet}")
    say(f"next: {next_command}")
    return sheet


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


# --- pairs -----------------------------------------------------------------------------------------------------------


def _inspect_pairs(path: Path, source: PairSource, num_images: int) -> _Findings:
    found = survey(source)
    records = list(found.records)
    prompts = [record.prompt for record in records]
    num_pairs = sum(record.is_pair for record in records)
    sizes = [size for r in records for size in (r.chosen_size_px, r.rejected_size_px) if any(size)]
    rows = [
        ("kind", f"{'pairs' if num_pairs else 'labelled images'} (data.type={source.type})"),
        ("rows", str(len(records) + len(found.dropped))),
        ("pairs", str(num_pairs) if num_pairs else _NOTHING),
        ("liked images", str(sum(bool(r.chosen_uid) for r in records)) if not num_pairs else _NOTHING),
        ("disliked images", str(sum(bool(r.rejected_uid) for r in records)) if not num_pairs else _NOTHING),
        ("ties", str(sum(record.label_prob == 0.5 for record in records))),
        ("prompts", f"{len(set(prompts))} different; words: {_spread(len(prompt.split()) for prompt in prompts)}"),
        ("image sizes", _sizes(sizes)),
        ("label probability", _spread(record.label_prob for record in records)),
        ("margin", _spread(record.margin for record in records if record.margin is not None)),
    ]
    for metric in sorted({name for record in records for name in record.chosen_scores}):
        for side in ("chosen", "rejected"):
            scores = (getattr(record, f"{side}_scores").get(metric, math.nan) for record in records)
            rows.append((f"{metric}, {side}", _spread(scores)))
    rows += _drop_rows(found.dropped)
    kind = "" if source.type == "pairs" else f"data.type={source.type} "
    objective = " loss.type=kto" if isinstance(source, LabelledData) else ""
    command = f"diffusion-dpo train {kind}{shlex.quote(f'data.path={path}')}{objective}"
    return rows, _pair_blocks(found, num_images // 2), command


def _pair_blocks(found: Collected, count: int) -> list[Block]:
    """Return pairs spread evenly over the data, chosen on the left with a green edge, rejected with a red one."""
    wanted = {record.pair_id for record in _spread_evenly(found.records, count)}
    blocks = []
    for pair in found if wanted else ():
        if pair.pair_id in wanted:
            tie = pair.label_prob == 0.5
            sides = (
                ("tie" if tie else "chosen", pair.chosen, pair.chosen_scores, GREY if tie else GREEN),
                ("tie" if tie else "rejected", pair.rejected, pair.rejected_scores, GREY if tie else RED),
            )
            tiles = [
                Tile(decode_rgb(data), " · ".join(filter(None, [name, _score_text(scores)])), edge)
                for name, data, scores, edge in sides
                if data
            ]
            blocks.append(Block(pair.prompt, tuple(tiles)))
    return blocks


# --- candidates ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Seen:
    """What is kept of a candidate that decodes; `key` finds its scores, `uid` is its pixel hash."""

    number: int
    where: str
    prompt: str
    group: str
    key: str
    uid: str
    size_px: tuple[int, int]


def _inspect_candidates(path: Path, num_images: int) -> _Findings:
    units = find_units(path)
    facts = read_facts(path) if path.is_dir() else {}
    verdicts = read_all_verdicts(path, facts) if facts else {}
    seen: list[_Seen] = []
    dropped: list[Dropped] = []
    with progress("looking", sum(unit.num_images for unit in units), "images") as advance:
        for it in in_order(_look, _numbered(units)):
            advance()
            if isinstance(it, Dropped):
                dropped.append(it)
            else:
                seen.append(it)
    groups: dict[str, list[_Seen]] = defaultdict(list)
    for it in seen:
        groups[it.group].append(it)
    repeats = len(seen) - len({(it.group, it.uid) for it in seen})
    rows = [
        ("kind", "candidates" if any(groups) else "images without prompts"),
        ("images", f"{len(seen)} of {len(seen) + len(dropped)} can be used"),
        ("prompts", f"{sum(map(bool, groups))} different; images each: {_spread(map(len, groups.values()))}"),
        ("image sizes", _sizes([it.size_px for it in seen])),
        ("same image again", f"{repeats} (under the same prompt)"),
    ]
    for name in facts:
        values = [verdicts.get(it.key, {}).get(name, Verdict(math.nan, "")).value for it in seen]
        missing = sum(map(math.isnan, values))
        rows.append((name, _spread(values) + (f"; {missing} without a score" if missing else "")))
    scores = {
        key: {name: it.value for name, it in found.items() if facts[name].main} for key, found in verdicts.items()
    }
    verb = "pair" if facts else "score"
    blocks = _candidate_blocks(units, list(groups.values()), scores, num_images)
    return rows + _drop_rows(dropped), blocks, f"diffusion-dpo {verb} {shlex.quote(f'path={path}')}"


def _numbered(units: Sequence[Unit]) -> Iterator[tuple[int, Candidate]]:
    return enumerate(candidate for unit in units for candidate in unit.read())


def _look(numbered: tuple[int, Candidate]) -> _Seen | Dropped:
    number, candidate = numbered
    if candidate.broken:
        return Dropped(candidate.where, candidate.broken)
    try:
        image = decode_rgb(candidate.data)
    except BrokenImage as error:
        return Dropped(candidate.where, str(error))
    return _Seen(
        number, candidate.where, candidate.prompt, candidate.group, candidate.key, pixel_hash(image), image.size
    )


def _candidate_blocks(
    units: Sequence[Unit], groups: Sequence[Sequence[_Seen]], scores: dict[str, dict[str, float]], num_images: int
) -> list[Block]:
    """Return the images of prompts that are spread evenly over the data, with their main scores."""
    if not groups or not num_images:
        return []
    largest = min(max(map(len, groups)), num_images)
    chosen = [group[:largest] for group in _spread_evenly(groups, max(1, num_images // largest))]
    wanted = {it.number for group in chosen for it in group}
    images = {number: decode_rgb(it.data) for number, it in _numbered(units) if number in wanted}
    blocks = []
    for group in chosen:
        captions = [_score_text(scores.get(it.key, {})) or it.where for it in group]
        tiles = [Tile(images[it.number], caption) for it, caption in zip(group, captions, strict=True)]
        blocks.append(Block(group[0].prompt, tuple(tiles)))
    return blocks


# --- words and numbers -----------------------------------------------------------------------------------------------


def _print(title: str, rows: _Rows) -> None:
    table = Table(title=Text(title), title_justify="left", show_header=False)
    for name, value in rows:
        if value != _NOTHING:
            table.add_row(Text(name), Text(value))
    show(table)


def _drop_rows(dropped: Sequence[Dropped]) -> _Rows:
    return (
        [(f"dropped: {len(dropped)}", "\n".join(line.strip() for line in describe_drops(dropped)))]
        if dropped
        else [("dropped", "0")]
    )


def _spread(values: Iterable[float]) -> str:
    """Smallest, median and largest of the numbers that are none of NaN."""
    known = [value for value in values if not math.isnan(value)]
    if not known:
        return _NOTHING
    return f"{min(known):.4g} to {max(known):.4g}, median {statistics.median(known):.4g}"


def _sizes(sizes: Sequence[tuple[int, int]]) -> str:
    """The commonest sizes, in px."""
    common = Counter(sizes).most_common()
    shown = [f"{width} x {height} ({count})" for (width, height), count in common[:_SIZES_SHOWN]]
    more = len(common) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "") + " px" if shown else _NOTHING


def _score_text(scores: dict[str, float]) -> str:
    return "  ".join(f"{name} {value:.3g}" for name, value in scores.items())


def _spread_evenly(items: Sequence[T], count: int) -> list[T]:
    """Return at most `count` items, evenly spread over the sequence, in its order."""
    count = min(count, len(items))
    return [items[i * len(items) // count] for i in range(count)]
