"""Prompts from text, TSV and JSON lines; an id says which prompt it is, never where in a file it stands."""

import csv
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from diffusion_dpo.config import ConfigError
from diffusion_dpo.console import say
from diffusion_dpo.pocket.world import distinct_scenes

NUM_POCKET_PROMPTS = 64


@dataclass(frozen=True)
class Prompt:
    """One prompt; `references` are encoded image files that scorers may compare with."""

    id: str
    text: str
    references: tuple[bytes, ...] = ()


def read_prompts(path: Path | None, *, limit: int | None = None, held_out: bool = False) -> list[Prompt]:
    """Return the prompts of a .txt, .tsv or .jsonl file, in its order; for None, prompts of the pocket world.

    `held_out` asks for the pocket world's held-out tenth. Repeated prompts are kept once and counted. Raises
    ConfigError for a file that is missing, unreadable, without a `prompt` column, or empty.
    """
    if path is None:
        scenes = islice(distinct_scenes(0, held_out=held_out), limit or NUM_POCKET_PROMPTS)
        return [_prompt(scene.caption) for scene in scenes]
    readers = {".txt": _read_txt, ".tsv": _read_tsv, ".jsonl": _read_jsonl}
    if path.suffix not in readers:
        raise ConfigError(f"prompts_path {path} must end in .txt, .tsv or .jsonl")
    try:
        found = list(readers[path.suffix](path))
    except FileNotFoundError as error:
        raise ConfigError(f"prompts_path: there is no file {error.filename}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"prompts_path: cannot read {path}: {error}") from None
    unique: dict[str, Prompt] = {}
    for prompt in found:
        other = unique.setdefault(prompt.id, prompt)
        if other.text != prompt.text:
            raise ConfigError(
                f"{path}: two different prompts have the id {prompt.id!r}: {other.text!r}, {prompt.text!r}"
            )
    if len(unique) < len(found):
        say(f"{path}: {len(found) - len(unique)} repeated prompts are used once")
    if not unique:
        raise ConfigError(f"prompts_path: {path} holds no prompts; write one a line")
    return list(unique.values())[:limit]


def _prompt(text: str, prompt_id: Any = None, references: tuple[bytes, ...] = ()) -> Prompt:
    text = text.strip()
    return Prompt(str(prompt_id) if prompt_id else hashlib.sha256(text.encode()).hexdigest()[:16], text, references)


def _read_txt(path: Path) -> Iterator[Prompt]:
    for line in path.read_text(encoding="utf-8-sig").splitlines():
        if line.strip():
            yield _prompt(line)


def _read_tsv(path: Path) -> Iterator[Prompt]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = csv.DictReader(file, delimiter="\t")
        columns = {(name or "").strip().lower(): name for name in rows.fieldnames or []}
        if "prompt" not in columns:
            raise ConfigError(
                f"{path}: the first line must name a column `prompt`; it names {', '.join(columns) or 'none'}"
            )
        for row in rows:
            if (row[columns["prompt"]] or "").strip():
                yield _prompt(row[columns["prompt"]], row.get(columns.get("id", "")))


def _read_jsonl(path: Path) -> Iterator[Prompt]:
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ConfigError(f"{path} line {number} is not JSON: {error}") from None
        if not isinstance(row, dict) or not isinstance(row.get("prompt"), str) or not row["prompt"].strip():
            raise ConfigError(f'{path} line {number} needs a text `prompt`, e.g. {{"prompt": "a red circle"}}')
        names = row.get("references") or []
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ConfigError(f"{path} line {number}: `references` must be a list of file names")
        yield _prompt(row["prompt"], row.get("id"), tuple((path.parent / name).read_bytes() for name in names))
