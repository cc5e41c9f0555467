"""What a model stands on: the judges, the data and the prompts of all trainings that led to it.

A run inherits them into its own manifest, so that they hold when the folder of its start is gone; exports pass them on
in theirs, and a LoRA for other programs, in its header, the judges alone.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from diffusion_dpo.config import ConfigError
from diffusion_dpo.files import read_manifest
from diffusion_dpo.models.adapters import find_adapter

HEADER = "diffusion_dpo.ancestry"
"""The entry in the header of a file that we export."""
_NAMES = ("labelled_by", "lineage", "prompt_hashes", "judges_not_known")
_MAX_HEADER_BYTES = 100_000_000


@dataclass(frozen=True)
class Ancestry:
    """What is known of all pairs that a model was trained on, by itself and by what it started from."""

    labelled_by: tuple[str, ...] = ()
    """Metrics that labelled them."""
    lineage: frozenset[str] = frozenset()
    """Of their data: see PairSource."""
    prompt_hashes: frozenset[str] = frozenset()
    judges_not_known: tuple[str, ...] = ()
    """Names of the runs and files of which nothing says what labelled their pairs."""

    def __or__(self, other: "Ancestry") -> "Ancestry":
        """Return what stands on both."""
        return Ancestry(
            _together(self.labelled_by, other.labelled_by),
            self.lineage | other.lineage,
            self.prompt_hashes | other.prompt_hashes,
            _together(self.judges_not_known, other.judges_not_known),
        )

    def still(self, before: Mapping[str, Any]) -> "Ancestry":
        """Return it with what the manifest of the same run said before: a folder that said so then may be gone now."""
        if "judges_not_known" not in before:
            return self
        earlier = of_facts(before, "")
        not_known = tuple(name for name in self.judges_not_known if name in earlier.judges_not_known)
        return replace(self | earlier, judges_not_known=not_known)

    def facts(self) -> dict[str, Any]:
        """Return it as a manifest keeps it."""
        return {
            "labelled_by": list(self.labelled_by),
            "lineage": sorted(self.lineage),
            "prompt_hashes": sorted(self.prompt_hashes),
            "judges_not_known": list(self.judges_not_known),
        }

    def header(self) -> dict[str, str]:
        """Return it as an entry of a file's header; hashes of prompts stay here."""
        shown = {name: value for name, value in self.facts().items() if name != "prompt_hashes"}
        return {HEADER: json.dumps(shown, sort_keys=True)}


def of_facts(facts: Mapping[str, Any], name: str) -> Ancestry:
    """Return what a manifest or header says; of one that names no judge, those of `name` are not known."""
    labelled_by, lineage, prompts, not_known = (tuple(_texts(facts.get(key))) for key in _NAMES)
    if not labelled_by and not not_known:
        not_known = (name,)
    return Ancestry(labelled_by, frozenset(lineage), frozenset(prompts), not_known)


def of_model(pretrained: str, adapter_path: Path | None) -> Ancestry:
    """Return what a model stands on that draws, or that training starts from."""
    found = _of_base(pretrained)
    return found if adapter_path is None else found | of_adapter(adapter_path)


def of_adapter(path: Path) -> Ancestry:
    """Return what an adapter, a run folder, a checkpoint or a file of an export stands on."""
    start = path.parent if path.is_file() else path
    for folder in (start, start.parent, start.parent.parent):
        manifest = read_manifest(folder)
        if manifest.get("made_by") in ("train", "export"):
            return of_facts(manifest, folder.resolve().name)
    try:
        file = find_adapter(path)[1]
    except ConfigError:  # which is said where it is used
        file = path
    return of_facts(_header_of(file), path.resolve().name)


def _of_base(pretrained: str) -> Ancestry:
    """Return what a base stands on: nothing, unless it is a merged model that `export` wrote."""
    path = Path(pretrained)
    if not path.exists():
        return Ancestry()
    folder = path if path.is_dir() else path.parent
    manifest = read_manifest(folder)
    if manifest.get("made_by") == "export":
        return of_facts(manifest, folder.resolve().name)
    header = _header_of(path)
    return of_facts(header, path.name) if header else Ancestry()


def _header_of(file: Path) -> dict[str, Any]:
    """Return what we wrote into the header of a safetensors file; {} where it is none, or another program wrote it."""
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(length)) if length <= _MAX_HEADER_BYTES else {}
        found = json.loads(header["__metadata__"][HEADER])
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, list | tuple):
        yield from (text for text in value if isinstance(text, str))


def _together(*groups: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(text for group in groups for text in group))
