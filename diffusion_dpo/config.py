"""Typed, closed settings: one YAML file per run, `key=value` on the command line, errors that name the right key.

A config is frozen and validated in full before anything heavy is imported. Defaults live in code, a YAML lists only
differences, and `load(dump(config)) == config`.
"""

import difflib
import functools
import json
import re
import shlex
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    SerializeAsAny,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from diffusion_dpo import other_names, registry
from diffusion_dpo.yaml_dialect import Dumper, Loader


class ConfigError(ValueError):
    """Something that the user has to mend: the message says what, where, which value, what to do."""


_ALSO_PATHS = ("pretrained", "processor", "encoder", "path")
"""Text settings that are a path or the name of something on the hub."""
UNDECIDED = "auto"
"""The type of a block whose type is found out later, and whose settings are those of any type."""
_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")
"""How an address begins; with one slash where it has become a Path. One letter is a drive of Windows."""


class Config(BaseModel):
    """Base of every block of settings: unknown keys are refused, values are frozen, field docstrings are the help.

    Its validator is built when it is first used: help and hints open many classes and validate few.
    """

    model_config = ConfigDict(
        extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False, defer_build=True
    )

    @model_validator(mode="before")
    @classmethod
    def _default_types(cls, data: Any) -> Any:
        return _name_types(cls, data) if isinstance(data, dict) else data

    @field_validator("*", mode="before")
    @classmethod
    def _local_path(cls, value: Any, info: ValidationInfo) -> Any:
        """Read `~` as the home folder wherever a path is meant, as a shell would, and refuse an address."""
        name = str(info.field_name)
        kind = cls.model_fields[name].annotation
        a_path = name in _ALSO_PATHS or Path in (kind, *typing.get_args(kind))
        if not a_path or not isinstance(value, str | Path):
            return value
        if _ADDRESS.match(str(value)):
            raise ValueError("an address such as s3:// or file:// is no path; give a file or folder of this machine")
        return str(Path(value).expanduser()) if str(value) == "~" or str(value).startswith("~/") else value


class Plugin(Config):
    """A Config with behaviour: its fields are its settings, its docstrings their documentation, its methods the work.

    The module of a plug-in imports torch and the like inside its methods only, so that a typo in its settings is
    answered at once.
    """

    type: str = ""
    """Name in the registry, or `my_package.my_module:MyClass` for a plug-in of your own."""


class ForeignPlugin(Plugin):
    """A plug-in of somebody's own that a file names which is data: its settings are read, its code is not run."""

    model_config = ConfigDict(extra="allow")


C = TypeVar("C", bound=Config)


def plugin(table: str, *, otherwise: str | None = None) -> Any:
    """Return the annotation of a field that holds one plug-in of a registry table.

    The value may be a block with `type`, a block without it (then of the field's default type, or of `otherwise`), or
    the bare name of a type where its defaults will do.
    """
    build = BeforeValidator(functools.partial(_build_plugin, table, otherwise))
    return Annotated[SerializeAsAny[Plugin], build, _Table(table)]


class _Table:
    """Marks a field as a plug-in, for the help text and for spelling hints."""

    def __init__(self, name: str) -> None:
        self.name = name


def load(cls: type[C], path: str | Path | None = None, overrides: Sequence[str] = (), *, is_data: bool = False) -> C:
    """Return the settings of a verb: defaults, then the YAML file, then the overrides (`a.b=value`, value as YAML).

    An override of `x.type` replaces the whole block x, whatever the order of the overrides, since the numbers of the
    old block had other units; a block whose type was left open keeps them. A file that `is_data`, found in a folder
    that may be anybody's, can name plug-ins, but none from outside is imported: see ForeignPlugin. Raises ConfigError
    with one line per problem.
    """
    data = _name_types(cls, _read_yaml(Path(path))) if path is not None else {}
    parsed = [_split_override(text) for text in overrides]
    for keys, value in parsed:
        if keys[-1] == "type" and len(keys) > 1 and _get(data, keys) not in (value, UNDECIDED):
            _set(data, keys[:-1], {"type": value})
    for keys, value in parsed:
        _set(data, keys, value)
    return validate(cls, data, where=str(path) if path is not None else "the command line", is_data=is_data)


def validate(cls: type[C], data: dict[str, Any], *, where: str, is_data: bool = False) -> C:
    """Validate plain data against a Config, as `load` does; raises ConfigError with one line per problem."""
    try:
        return cls.model_validate(data, context={"is_data": is_data})
    except ValidationError as error:
        lines = [str(problem) for problem in _explain(cls, error)]
        raise ConfigError("\n".join([f"{len(lines)} problem{'s'[: len(lines) != 1]} in {where}:", *lines])) from None


def dump(config: Config) -> str:
    """Return the complete settings as YAML that `load` reads back into an equal config."""
    return yaml.dump(config.model_dump(mode="json"), Dumper=Dumper, sort_keys=False, allow_unicode=True, width=119)


def override(key: str, value: object) -> str:
    """Return `key=value` as `load` reads it back: a text that YAML would take for something else is quoted."""
    if not isinstance(value, str | Path):
        return f"{key}={json.dumps(value, separators=(',', ':'))}"
    text = str(value)
    try:
        plain = yaml.load(text, Loader) == text  # noqa: S506 - a SafeLoader
    except yaml.YAMLError:
        plain = False
    return f"{key}={text if plain else json.dumps(text)}"


def command(verb: str, settings: Mapping[str, object]) -> str:
    """Return the line that runs a verb with these settings in a shell."""
    return shlex.join(["diffusion-dpo", verb, *(override(key, value) for key, value in settings.items())])


def no_such_setting(name: str, known: Iterable[str]) -> PydanticCustomError:
    """Return what a validator raises on a key that no setting has, with the nearest one of those known."""
    near = difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.6)
    problem = _Problem(name, "there is no such setting", near[0] if near else None)
    return PydanticCustomError("plugin", "{problems}", {"problems": [problem]})


# --- reading ---------------------------------------------------------------------------------------------------------


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.y*ml")], n=1)
        raise ConfigError(f"there is no config file {path}." + (f" Did you mean {near[0]}?" if near else "")) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the config file {path}: {error}") from error
    try:
        data = yaml.load(text, Loader)  # noqa: S506 - a SafeLoader
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if data is not None and not isinstance(data, dict):
        raise ConfigError(f"{path} must hold settings as `key: value` lines, not a {type(data).__name__}")
    return data or {}


def _split_override(text: str) -> tuple[list[str], Any]:
    key, separator, value = text.partition("=")
    if not separator or not key or not all(part.isidentifier() for part in key.split(".")):
        raise ConfigError(f"{text!r} is not a setting: write key=value, e.g. seed=1 or loss.beta=2000")
    try:
        return key.split("."), yaml.load(value, Loader)  # noqa: S506 - a SafeLoader
    except yaml.YAMLError as error:
        raise ConfigError(
            f"the value of {key} is not valid YAML: {value!r} ({' '.join(str(error).split())})"
        ) from None


def refuse_lost(overrides: Sequence[str]) -> None:
    """Raise ConfigError where one of the settings that were typed would silently undo an earlier one."""
    given = [text.partition("=")[0].split(".") for text in overrides]
    for number, keys in enumerate(given):
        for before in given[:number]:
            if before == keys:
                raise ConfigError(f"{'.'.join(keys)} is set twice on the command line; give it once")
            if before[: len(keys)] == keys:
                block, inner = ".".join(keys), ".".join(before)
                raise ConfigError(f"{block} is set after {inner}, which it would undo; give {block} first")


def _get(data: dict[str, Any], keys: list[str]) -> Any:
    for key in keys:
        data = data.get(key, {}) if isinstance(data, dict) else {}
    return data


def _set(data: dict[str, Any], keys: list[str], value: Any) -> None:
    for key in keys[:-1]:
        block = data.get(key)
        if isinstance(block, str):  # the short form of a plug-in
            block = {"type": block}
        data[key] = dict(block) if isinstance(block, dict) else {}
        data = data[key]
    data[keys[-1]] = value


def _name_types(cls: type[Config], data: dict[str, Any]) -> dict[str, Any]:
    """Give the blocks of plug-ins that do not name their type the type that is the field's default."""
    named = dict(data)
    for name, field in cls.model_fields.items():
        block = data.get(name)
        if isinstance(block, dict) and "type" not in block and isinstance(field.default, str) and table_of(field):
            named[name] = {"type": field.default, **block}
    return named


def _build_plugin(table: str, otherwise: str | None, value: Any, info: ValidationInfo) -> Plugin:
    if isinstance(value, Plugin):
        return value
    block = {"type": value} if isinstance(value, str) else value
    if isinstance(block, dict) and otherwise is not None:
        block = {"type": otherwise, **block}
    if not isinstance(block, dict) or not isinstance(block.get("type"), str):
        known = ", ".join(registry.TABLES[table])
        raise PydanticCustomError("plugin_type", "needs a `type` ({known})", {"known": known})
    is_data = bool(info.context and info.context["is_data"])
    if is_data and block["type"] not in registry.TABLES[table]:
        return ForeignPlugin.model_validate(block)
    try:
        cls = registry.resolve(table, block["type"])
    except ValueError as error:
        raise PydanticCustomError("plugin_type", "{text}", {"text": str(error)}) from None
    if not issubclass(cls, Plugin):
        raise PydanticCustomError("plugin_type", "{name} is not a Plugin", {"name": cls.__name__})
    try:
        return cls.model_validate(block, context=info.context)
    except ValidationError as error:
        raise PydanticCustomError("plugin", "{problems}", {"problems": list(_explain(cls, error))}) from None


# --- explaining ------------------------------------------------------------------------------------------------------


class _Problem(typing.NamedTuple):
    """What is wrong with one setting, and the key that was probably meant; dotted keys, "" for the block itself."""

    key: str
    text: str
    meant: str | None = None

    def within(self, block: str) -> "_Problem":
        """Return the same problem as seen from outside a block; "" is no block."""
        if not block:
            return self
        key = f"{block}.{self.key}" if self.key else block
        return _Problem(key, self.text, self.meant and f"{block}.{self.meant}")

    def __str__(self) -> str:
        text = f"{self.key}: {self.text}" if self.key else self.text
        return f"{text}. Did you mean {self.meant}?" if self.meant else text


def _explain(cls: type[Config], error: ValidationError) -> Iterator[_Problem]:
    """Yield every problem, with the nearest right key where there is one."""
    for problem in error.errors():
        path = [str(part) for part in problem["loc"] if not str(part).startswith("function-")]
        key = ".".join(path)
        if problem["type"] == "plugin":
            yield from (inner.within(key) for inner in problem["ctx"]["problems"])
        elif problem["type"] == "extra_forbidden":
            yield _unknown_key(cls, path)
        elif problem["type"] == "missing":
            yield _Problem(key, "is required")
        else:
            message = problem["msg"].removeprefix("Value error, ")
            shown = "" if isinstance(problem["input"], dict | Config) else f" (got {problem['input']!r})"
            here = other_names.VALUES.get((path[-1] if path else "", str(problem["input"]).lower()))
            yield _Problem(key, message + shown + (f"; it is {here} here" if here else ""))


def _unknown_key(cls: type[Config], path: list[str]) -> _Problem:
    key, text = ".".join(path), "there is no such setting"
    if "." in path[-1]:
        block, _, leaf = path[-1].partition(".")
        return _Problem(key, f"{text}; in YAML, blocks are nested: `{block}: {{{leaf}: ...}}`")
    found: type[Config] | None = cls
    parts = iter(path[:-1])
    for part in parts:
        field = found.model_fields.get(part) if found else None
        found = config_in(field.annotation) if field else found
        if field and is_named(field.annotation):
            next(parts, None)  # a name of the user's
    siblings = list(found.model_fields) if found else []
    near = difflib.get_close_matches(path[-1], siblings, n=1, cutoff=0.6)
    is_others = path[-1].lower() in other_names.ANSWERS
    if near and not is_others:
        return _Problem(key, text, ".".join([*path[:-1], near[0]]))
    from diffusion_dpo.config_help import settings  # which is about what is here

    everywhere = [re.sub(r"\[\w+\]", "", setting.key) for setting in settings(cls)]
    blocks = ("model", "data", "loss") if issubclass(cls, Plugin) else ()  # in which this one may stand
    known = {*everywhere, *(f"{block}.{name}" for block in blocks for name in everywhere)}
    elsewhere = other_names.answer(path[-1], known)
    if elsewhere is not None:
        return _Problem(key, f"{text}: {elsewhere}")
    if near:
        return _Problem(key, text, ".".join([*path[:-1], near[0]]))
    same = [other for other in everywhere if other.rpartition(".")[2] == path[-1] and other != key]
    return _Problem(key, text, same[0]) if same else _Problem(key, f"{text}; known here: {', '.join(siblings)}")


def config_in(annotation: Any) -> type[Config] | None:
    """The Config class inside an annotation such as `Lora | None` or `list[Lora]`, if there is one."""
    if isinstance(annotation, type) and issubclass(annotation, Config):
        return annotation
    for argument in typing.get_args(annotation):
        found = config_in(argument)
        if found is not None:
            return found
    return None


def is_named(annotation: Any) -> bool:
    """Whether a field holds blocks by names that the user chooses."""
    return typing.get_origin(annotation) is dict


def table_of(field: Any) -> str | None:
    """The registry table of a plug-in field, or of a list of plug-ins."""
    marks = [*field.metadata, *(m for a in typing.get_args(field.annotation) for m in getattr(a, "__metadata__", ()))]
    return next((mark.name for mark in marks if isinstance(mark, _Table)), None)
