"""Prompts from text, TSV, JSON and JSON lines; an id says which prompt it is, never where in a file it stands."""

import csv
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from diffusion_dpo.config import ConfigError
from diffusion_dpo.console import say
from diffusion_dpo.data.images import BrokenImage, decode_rgb
from diffusion_dpo.data.inside import read_inside
from diffusion_dpo.data.suites import SUITES, suite_files
from diffusion_dpo.pocket.world import distinct_scenes, num_captions

NUM_POCKET_PROMPTS = 64
_POCKET = "pocket"
"""The suite that needs no file: captions of the pocket world's held-out tenth."""


@dataclass(frozen=True)
class Prompt:
    """One prompt; `references` are encoded image files that scorers may compare with.

    The `category` is what its suite files it under, empty where nothing does; it is no part of what the prompt is.
    """

    id: str
    text: str
    references: tuple[bytes, ...] = ()
    category: str = field(default="", compare=False)


def read_prompts(path: Path | None, *, limit: int | None = None, held_out: bool = False) -> list[Prompt]:
    """Return the prompts of a .txt, .tsv, .json or .jsonl file, in its order; for None, prompts of the pocket world.

    A name of SUITES that is no file here stands for that suite, which is downloaded once, and `pocket` for prompts of
    the pocket world's held-out tenth, which `held_out` asks for, too. Repeated prompts are kept once, in their first
    category, and counted. Raises ConfigError for a file that is missing, unreadable, without a `prompt` column, or
    empty, for a reference that is no image inside the file's folder, and for a limit above what the pocket world has.
    """
    name = _suite_name(path)
    if path is None or name == _POCKET:
        return _pocket_prompts(limit or NUM_POCKET_PROMPTS, held_out or name == _POCKET)
    paths = suite_files(name) if name else [path]
    readers = {".txt": _read_txt, ".tsv": _read_tsv, ".json": _read_json, ".jsonl": _read_jsonl}
    if any(it.suffix not in readers for it in paths):
        raise ConfigError(
            f"prompts_path {path} must end in .txt, .tsv, .json or .jsonl, or be the name of a suite, "
            f"{', '.join(SUITES)} or {_POCKET}"
        )
    try:
        found = [prompt for it in paths for prompt in readers[it.suffix](it)]
    except FileNotFoundError as error:
        raise ConfigError(f"prompts_path: there is no file {error.filename}") from None
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"prompts_path: cannot read {path}: {error}") from None
    unique: dict[str, Prompt] = {}
    num_refiled = 0
    for prompt in found:
        other = unique.setdefault(prompt.id, prompt)
        num_refiled += other.category != prompt.category
        if other != prompt:
            raise ConfigError(
                f"{path}: two different prompts (or references) have the id {prompt.id!r}: "
                f"{other.text!r}, {prompt.text!r}"
            )
    if len(unique) < len(found):
        refiled = f", {num_refiled} of them under the first of several categories" if num_refiled else ""
        say(f"{path}: {len(found) - len(unique)} repeated prompts are used once{refiled}")
    if not unique:
        raise ConfigError(f"prompts_path: {path} holds no prompts; write one a line")
    return list(unique.values())[:limit]


def refuse_foreign_defaults(path: Path | None, *models: str) -> None:
    """Raise ConfigError when the default prompts, which are of the pocket world, would go to another model."""
    foreign = [model for model in models if model != "pocket"]
    if path is None and foreign:
        raise ConfigError(
            f"prompts_path is not set, and the default prompts are those of the pocket world, which say nothing about "
            f"{foreign[0]}; give prompts_path a .txt with one prompt a line"
        )


def prompt_hash(text: str) -> str:
    """Return a short hash (12 hex digits), by which a training run remembers its prompts."""
    return key_hash(prompt_key(text))


def prompt_key(text: str) -> int:
    """Return the number, 64 bits, that a prompt goes by where very many are compared; outer spaces do not count."""
    return int.from_bytes(hashlib.sha256(text.strip().encode()).digest()[:8], "big")


def key_hash(key: int) -> str:
    """Return the `prompt_hash` of the prompts with this key."""
    return f"{key >> 16:012x}"


def _suite_name(path: Path | None) -> str:
    """Return the name of the suite that a path stands for, empty where it is a file's."""
    is_bare = path is not None and path.parent == Path() and not path.is_file()
    return path.name if path is not None and is_bare and path.name in (*SUITES, _POCKET) else ""


def _pocket_prompts(count: int, held_out: bool) -> list[Prompt]:
    available = num_captions(held_out=held_out)
    if count > available:
        split = "held-out " if held_out else ""
        raise ConfigError(f"num_prompts is {count}, and the pocket world has {available} {split}captions")
    scenes = islice(distinct_scenes(0, held_out=held_out), count)
    return [_prompt(it.caption, category="one shape" if len(it.items) == 1 else "two shapes") for it in scenes]


def _prompt(text: str, prompt_id: Any = None, references: tuple[bytes, ...] = (), category: Any = None) -> Prompt:
    """Return a prompt; without an id of its own, one that says what it is: its text and its references."""
    text = text.strip()
    if prompt_id is None or prompt_id == "":
        digest = hashlib.sha256(text.encode())
        for reference in references:
            digest.update(hashlib.sha256(reference).digest())
        prompt_id = digest.hexdigest()[:16]
    return Prompt(str(prompt_id), text, references, str(category or "").strip())


def _lines(path: Path) -> list[str]:
    """Return the lines of a text file; what else Unicode calls a line break may stand inside a prompt."""
    return path.read_text(encoding="utf-8-sig").split("\n")


def _read_txt(path: Path) -> Iterator[Prompt]:
    for line in _lines(path):
        if line.strip():
            yield _prompt(line)


def _read_tsv(path: Path) -> Iterator[Prompt]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        columns = {(name or "").strip().lower(): name for name in rows.fieldnames or []}
        if "prompt" not in columns:
            raise ConfigError(
                f"{path}: the first line must name a column `prompt`; it names {', '.join(columns) or 'none'}"
            )
        for row in rows:
            if (row[columns["prompt"]] or "").strip():
                category = row.get(columns.get("category", ""))
                yield _prompt(row[columns["prompt"]], row.get(columns.get("id", "")), category=category)


def _read_json(path: Path) -> Iterator[Prompt]:
    """Read a list of texts, whose category is the file's name, or lists by category, as HPSv2's benchmark has them."""
    try:
        data = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not JSON: {error}") from None
    lists = data if isinstance(data, dict) else {path.stem: data}
    for category, texts in lists.items():
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise ConfigError(f"{path} must hold a list of texts, or such lists by category")
        if not all(map(_is_unicode, (category, *texts))):
            raise ConfigError(f"{path}: half of a surrogate pair is not valid Unicode; mend the escape")
        yield from (_prompt(text, category=category) for text in texts if text.strip())


def _read_jsonl(path: Path) -> Iterator[Prompt]:
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{path} line {number} is not JSON: {error}") from None
        if not isinstance(row, dict) or not isinstance(row.get("prompt"), str) or not row["prompt"].strip():
            raise ConfigError(f'{path} line {number} needs a text `prompt`, e.g. {{"prompt": "a red circle"}}')
        tag = row.get("tag")  # what GenEval calls its categories, and other people other things
        category = row.get("category") or (tag if isinstance(tag, str) else "")
        if not isinstance(category, str | int):
            raise ConfigError(f"{path} line {number}: `category` must be a text")
        if not all(map(_is_unicode, (row["prompt"], str(row.get("id")), str(category)))):
            raise ConfigError(f"{path} line {number}: half of a surrogate pair is not valid Unicode; mend the escape")
        names = row.get("references") or []
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ConfigError(f"{path} line {number}: `references` must be a list of file names")
        where = f"{path} line {number}"
        references = tuple(_reference(path.parent, name, where) for name in names)
        yield _prompt(row["prompt"], row.get("id"), references, category)


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _reference(folder: Path, name: str, where: str) -> bytes:
    """Return a reference image's file; raises ConfigError where it is none or lies elsewhere."""
    data = read_inside(folder, name)
    if isinstance(data, str):
        raise ConfigError(f"{where}: reference {name!r}: {data}; name an image beside the prompts' file")
    try:
        decode_rgb(data)
    except BrokenImage as error:
        raise ConfigError(f"{where}: reference {name!r}: {error}") from None
    return data
