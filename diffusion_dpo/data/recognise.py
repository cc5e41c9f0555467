"""The one place that decides what a path holds; every verb that takes a path asks here.

A reader of pairs says itself what it recognises (`PairSource.recognise`), and the readers are asked in the order of
the registry's table. What is not pairs has a rule below.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeVar

from pydantic import ConfigDict, model_validator

from diffusion_dpo import registry
from diffusion_dpo.config import Config, ConfigError, command, no_such_setting, validate
from diffusion_dpo.console import say
from diffusion_dpo.data import Dropped, PairSource, PreferencePair
from diffusion_dpo.data.holding import Holding, Table, look_into
from diffusion_dpo.data.image_kinds import DECODED
from diffusion_dpo.data.layout import describe_nearest

if TYPE_CHECKING:
    from diffusion_dpo.data.candidates import Unit

C = TypeVar("C", bound=Config)

_EXPECTED = """Expected is one of
  a folder with metadata.jsonl and image files: {"prompt": "a cat", "chosen": "cat_1.png", "rejected": "cat_2.png"}
  two folders, chosen/ and rejected/, with images of the same names, and their captions
  Parquet with the columns prompt, chosen, rejected (images as bytes): pairs
  the same with image and label (true: liked) instead of chosen and rejected: labelled images
  Parquet with the columns caption, jpg_0, jpg_1, label_0: Pick-a-Pic
  Parquet with the column image, or a folder of image files: candidates
All that is read is listed in docs/formats.md."""


@dataclass(frozen=True)
class Recognised:
    """What a path holds, in words; and how to read it, where it holds pairs."""

    path: Path
    kind: str
    """A noun: `preference pairs`, `candidates`, `a training run`."""
    source: PairSource | None = None
    """The reader, of pairs."""
    advice: str = ""
    """What to do with it, of our own folders: a command, or a sentence."""

    @property
    def are_candidates(self) -> bool:
        """Whether it holds images to be judged."""
        return self.kind == CANDIDATES


CANDIDATES = "candidates"
_TO_BE_JUDGED = "images to be judged"
Rule = Callable[[Holding], Recognised | None]


def recognise(path: Path, settings: dict[str, Any] | None = None) -> Recognised:
    """Return what a path holds, without reading a row or an image; `settings` of `data` reach the reader of pairs.

    Raises ConfigError, saying what is there and what is expected, when it is nothing that is known.
    """
    holding = look_into(path)
    for rule in (_own_folder, _pairs, _by_settings(settings or {}), _candidates):
        found = rule(holding)
        if found is not None:
            return _with_settings(found, settings or {})
    raise ConfigError(_unknown(holding))


class AutoData(PairSource):
    """The layout that the path turns out to have; any setting of that layout may stand beside the path."""

    model_config = ConfigDict(extra="allow")

    path: Path = Path("runs/pairs")
    """A file or folder of pairs, as `inspect` names it."""

    @model_validator(mode="after")
    def _settings_exist(self) -> Self:
        given = self.model_extra or {}
        known = {key for kind in _readers().values() for key in kind.model_fields} if given else set()
        for name in given:
            if name not in known:
                raise no_such_setting(name, known)
        return self

    def recognised(self) -> PairSource:
        """Return the reader of what the path holds; raises ConfigError when it holds no pairs."""
        found = recognise(self.path, self.model_extra)
        if found.source is None:
            raise ConfigError(refusal(found, "preference pairs"))
        return found.source

    def read(self) -> Iterator[PreferencePair | Dropped]:
        """Yield the rows of what the path holds."""
        return self.recognised().read()


def recognise_either(path: Path, source: PairSource | None) -> Recognised:
    """Return what a verb is about that takes a `path`, or pairs as `train` does; raises ConfigError as `recognise`."""
    if source is None:
        return recognise(path)
    if isinstance(source, AutoData):
        return recognise(source.path if "path" in source.model_fields_set else path, source.model_extra)
    return Recognised(Path(str(source.model_dump().get("path", source.type))), source.noun, source)


def images_at(path: Path, prompt_column: str | None = None) -> "list[Unit]":
    """Return the images to be judged of a path; ConfigError, as of `recognise`, where it holds something else."""
    from diffusion_dpo.data.candidates import find_units

    ours = _own_folder(look_into(path))
    if ours is not None:
        raise ConfigError(refusal(ours, _TO_BE_JUDGED))
    try:
        return find_units(path, prompt_column)
    except ConfigError as error:
        found = _known(path)
        if found is None or found.are_candidates:
            raise
        raise ConfigError(refusal(found, _TO_BE_JUDGED)) from error


def _known(path: Path) -> Recognised | None:
    try:
        return recognise(path)
    except ConfigError:
        return None


def settle(config: C) -> C:
    """Return settings whose `data` names its type; where it was left open, that of what the path holds, and say so.

    Cheap: no row, image or model is read. Raises ConfigError when the path holds no pairs.
    """
    source = config.data  # type: ignore[attr-defined]  # of every verb that trains on or passes on pairs
    if not isinstance(source, AutoData):
        return config
    found = source.recognised()
    say(f"data: {source.path} holds {found.noun} (data.type={found.type})")
    return config.model_copy(update={"data": found})


def refusal(found: Recognised, wanted: str) -> str:
    """Return the sentence on a path that holds something else than a verb wants."""
    advice = found.advice or f"look at it with: {command('inspect', {'path': found.path})}"
    return f"{found.path} holds {found.kind}, and {wanted} are needed here; {advice}"


# --- rules -----------------------------------------------------------------------------------------------------------


def _readers() -> dict[str, type[PairSource]]:
    """The readers of the registry by name, in its order, which is that in which they are asked."""
    names = (name for name in registry.TABLES["data"] if name != "auto")
    return {name: registry.resolve("data", name) for name in names}


def _pairs(holding: Holding) -> Recognised | None:
    for view in holding.views():
        for name, reader in _readers().items():
            settings = reader.recognise(view)
            if settings is not None:
                source = reader.model_validate({"path": holding.path, **settings, "type": name})
                return Recognised(holding.path, source.noun, source)
    return None


def _by_settings(settings: dict[str, Any]) -> Rule:
    """Return the rule that settings name the reader which alone has them, whatever the names in the files."""

    def rule(holding: Holding) -> Recognised | None:
        able = [(name, reader) for name, reader in _readers().items() if settings.keys() <= reader.model_fields.keys()]
        if not settings or len(able) != 1:
            return None
        [(name, reader)] = able
        source = validate(reader, {"path": str(holding.path), **settings, "type": name}, where="the settings of data")
        return Recognised(holding.path, source.noun, source)

    return rule


def _with_settings(found: Recognised, settings: dict[str, Any]) -> Recognised:
    """Return the same with the settings that were given beside the path; raises ConfigError where it has no such."""
    if found.source is None or not settings:
        return found
    own = found.source.model_dump(exclude_unset=True)
    where = f"the settings of data ({found.path} holds {found.kind}: data.type={found.source.type})"
    return Recognised(found.path, found.kind, validate(type(found.source), own | settings, where=where))


def _candidates(holding: Holding) -> Recognised | None:
    from diffusion_dpo.data.candidates import image_column
    from diffusion_dpo.data.captions import FILE_NAMES

    tables = [table for table in holding.tables if not table.is_text]
    if any(image_column(table.columns) for table in tables):
        return Recognised(holding.path, CANDIDATES)
    nameless = [it for it in holding.tables if it.is_metadata and it.columns and not it.columns & set(FILE_NAMES)]
    if holding.paths(*DECODED) and not nameless:
        return Recognised(holding.path, CANDIDATES)
    if foreign := [*nameless, *tables]:
        raise ConfigError(_foreign(holding.path, foreign[0]))
    return None


def _foreign(path: Path, table: Table) -> str:
    nearest = describe_nearest(table.columns)
    return (
        f"{table.files[0]} has the columns {', '.join(sorted(table.columns))}, of which no layout is known"
        f"{f': {nearest}' if nearest else ''}. Rename them, or name them with data.type=hub "
        f"data.path={table.files[0] if table.is_text else path} data.prompt_column=... (see `diffusion-dpo train "
        f"--help`).\n{_EXPECTED}"
    )


_OWN: dict[str, tuple[str, Callable[[Path], str]]] = {
    "train": ("a training run", lambda path: f"next: {command('report', {'path': path})}"),
    "find-beta": ("the probes of train --find-beta", lambda path: f"its numbers are in {path / 'probes.json'}"),
    "compare": ("a comparison", lambda path: f"its report is {path / 'report.html'}"),
    "label": ("a labelling study", lambda path: f"its pairs are in {path / 'pairs'}"),
    "demo": ("the demo", lambda path: f"its pairs are in {path / 'pairs'}, its report is {path / 'report.html'}"),
    "score": ("scores without their images", lambda path: f"next: {command('pair', {'scores_dir': path})}"),
}
"""What a verb makes that is neither pairs nor candidates, and what to do with it."""
_PARTS = {"previews": "the previews", "checkpoints": "the checkpoints", "adapter": "the adapter", "unet": "the UNet"}


def _own_folder(holding: Holding) -> Recognised | None:
    made_by, above = holding.manifest.get("made_by"), holding.manifest_above.get("made_by")
    path, part = holding.path, holding.path.resolve().name
    if made_by in _OWN:
        kind, advice = _OWN[made_by]
        return Recognised(path, kind, advice=advice(path))
    if made_by == "export" and "adapter" in holding.manifest:
        return Recognised(path, "an exported model", advice="other programs read it")
    if above == "train" and part in _PARTS:
        return Recognised(path, f"{_PARTS[part]} of a training run", advice=_OWN["train"][1](path.parent))
    return None


def _unknown(holding: Holding) -> str:
    found = Counter({suffix or "no extension": count for suffix, count in holding.suffixes.items()})
    counts = ", ".join(f"{count} x {suffix}" for suffix, count in found.most_common(8)) or "no files at all"
    links = f", and links to folders, which are not followed: {', '.join(holding.links)}" if holding.links else ""
    links += "; copy what they lead to, or give the folder that holds it" if links else ""
    return f"nothing to read in {holding.path.resolve()}: it holds {counts}{links}.\n{_EXPECTED}"
