"""Prompts from text, tables, JSON and Parquet; an id says which prompt it is, never where in a file it stands."""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from diffusion_dpo.config import ConfigError
from diffusion_dpo.console import say
from diffusion_dpo.data.images import BrokenImage, decode_rgb
from diffusion_dpo.data.inside import read_inside
from diffusion_dpo.data.listing import some
from diffusion_dpo.data.shards import column_names, located_rows
from diffusion_dpo.data.suites import SUITES, suite_files
from diffusion_dpo.data.tables import prompt_value, read_table, text_column
from diffusion_dpo.data.text import decode_text
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
    """Return the prompts of a text file, a table or JSON, in its order; for None, prompts of the pocket world.

    A name of SUITES that is no file here stands for that suite, which is downloaded once, and `pocket` for prompts of
    the pocket world's held-out tenth, which `held_out` asks for, too. Repeated prompts are kept once, in their first
    category, and counted. Raises ConfigError for a file that is missing, unreadable, without a column of prompts, or
    empty, for a reference that is no image inside the file's folder, and for a limit above what the pocket world has.
    """
    name = _suite_name(path)
    if path is None or name == _POCKET:
        return _pocket_prompts(limit or NUM_POCKET_PROMPTS, held_out or name == _POCKET)
    paths = suite_files(name) if name else [path]
    if any(it.suffix.lower() not in _READERS for it in paths):
        *others, last = _READERS
        raise ConfigError(
            f"prompts_path {path} must end in {', '.join(others)} or {last}, or be the name of a suite, "
            f"{', '.join(SUITES)} or {_POCKET}"
        )
    absent = next((it for it in paths if not it.is_file()), None)
    if absent is not None:
        raise ConfigError(f"prompts_path: there is no file {absent}")
    try:
        found = [prompt for it in paths for prompt in _READERS[it.suffix.lower()](it)]
    except (OSError, UnicodeDecodeError) as error:
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
    return decode_text(path.read_bytes()).split("\n")


def _read_txt(path: Path) -> Iterator[Prompt]:
    for line in _lines(path):
        if line.strip():
            yield _prompt(line)


def _read_table(path: Path) -> Iterator[Prompt]:
    """Read .csv and .tsv; the prompt may be called Prompts (DrawBench), Prompt (PartiPrompts), text or caption."""
    yield from _of_rows(path, read_table(path))


def _read_parquet(path: Path) -> Iterator[Prompt]:
    present = column_names(path)
    wanted = [name for name in present if name.lower() in ("id", "category", "tag")]
    column = text_column(present)
    yield from _of_rows(
        path, located_rows(path, [*wanted, column]) if column else iter([("", dict.fromkeys(present))])
    )


def _of_rows(path: Path, rows: Iterator[tuple[str, Mapping[str, Any]]]) -> Iterator[Prompt]:
    """Return the prompts of a table; rows without one are counted, and passed over."""
    column, names, without = None, {}, []
    for where, row in rows:
        if column is None:
            column, names = text_column(row), {name.strip().lower(): name for name in row}
            if column is None:
                raise ConfigError(
                    f"{path}: a column must be called `prompt`, `text` or `caption`; the columns are {', '.join(row)}"
                )
        text, fault = prompt_value(row[column])
        if fault:
            without.append(f"{where}: {fault}")
            continue
        category = row.get(names.get("category", "")) or row.get(names.get("tag", ""))
        yield _prompt(text, row.get(names.get("id", "")), category=category)
    if without:
        say(f"{path}: {len(without)} rows have no prompt and are passed over ({some(without)})")


def _read_json(path: Path) -> Iterator[Prompt]:
    """Read a list of texts or of objects, whose category is the file's name, or lists by category, as HPSv2 has them.

    Objects by an id, as GenAI-Bench has them, are read, too.
    """
    try:
        data = json.loads(decode_text(path.read_bytes()))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not JSON: {error}") from None
    if isinstance(data, dict) and data and all(isinstance(it, dict) for it in data.values()):
        data = [{"id": name, **it} for name, it in data.items()]
    lists = data if isinstance(data, dict) else {path.stem: data}
    for category, items in lists.items():
        if not isinstance(items, list) or not all(isinstance(it, str | dict) for it in items):
            raise ConfigError(f"{path} must hold a list of texts or objects, or such lists by category")
        for number, item in enumerate(items):
            where = f"{path} item {number}"
            if isinstance(item, dict):
                yield _of_object(path, item, where, category if isinstance(data, dict) else "")
            elif not all(map(_is_unicode, (category, item))):
                raise ConfigError(f"{where}: half of a surrogate pair is not valid Unicode; fix the escape")
            elif item.strip():
                yield _prompt(item, category=category)


def _read_jsonl(path: Path) -> Iterator[Prompt]:
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{path} line {number} is not JSON: {error}") from None
        yield _of_object(path, row, f"{path} line {number}")


def _of_object(path: Path, row: Any, where: str, category: str = "") -> Prompt:
    """Return the prompt of an object of JSON, with its id, category and references."""
    column = text_column(row) if isinstance(row, dict) else None
    text, fault = prompt_value(row[column]) if column else ("", "no prompt")
    if fault:
        raise ConfigError(
            f'{where} needs a text `prompt`, `text` or `caption`, e.g. {{"prompt": "a red circle"}}; here: {fault}'
        )
    tag = row.get("tag")  # what GenEval calls its categories, and other people other things
    category = row.get("category") or (tag if isinstance(tag, str) else "") or category
    if not isinstance(category, str | int):
        raise ConfigError(f"{where}: `category` must be a text")
    if not all(map(_is_unicode, (text, str(row.get("id")), str(category)))):
        raise ConfigError(f"{where}: half of a surrogate pair is not valid Unicode; fix the escape")
    names = row.get("references") or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ConfigError(f"{where}: `references` must be a list of file names")
    references = tuple(_reference(path.parent, name, where) for name in names)
    return _prompt(text, row.get("id"), references, category)


_READERS: dict[str, Callable[[Path], Iterator[Prompt]]] = {
    ".txt": _read_txt,
    ".csv": _read_table,
    ".tsv": _read_table,
    ".json": _read_json,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
}


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
