"""Every setting of a config class, with type, bounds, default and meaning: what the help lists and hints look in."""

import ast
import functools
import inspect
import itertools
import sys
import types
import typing
from collections.abc import Iterator
from typing import Annotated, Any

from diffusion_dpo import registry
from diffusion_dpo.config import Config, Plugin, config_in, is_named, table_of


class Setting(typing.NamedTuple):
    """One entry of the help: a dotted key, its type and bounds, its default, and what it means."""

    key: str
    type: str
    default: str
    help: str
    table: str | None = None
    """The registry table, where the setting is a plug-in."""


def settings(cls: type[Config], prefix: str = "", block: Config | None = None, within: str = "") -> Iterator[Setting]:
    """Yield every setting of a config class, depth first, plug-ins with the settings of each registered type.

    `block` holds the defaults where they are not those of the class; plug-ins of the table `within` are not opened.
    """
    for name, field in cls.model_fields.items():
        key = prefix + name
        value = getattr(block, name) if block is not None else field.get_default(call_default_factory=True)
        default = "required" if field.is_required() else _show_default(value)
        table = table_of(field)
        yield Setting(key, _describe_type(field), default, _meaning(cls, name), table)
        inner = config_in(field.annotation)
        if table is not None:
            for type_name in registry.TABLES[table] if table != within else ():
                for setting in settings(registry.resolve(table, type_name), f"{key}[{type_name}].", within=table):
                    if not setting.key.endswith("].type"):
                        yield setting
        elif inner is not None:
            below = f"{key}.NAME." if is_named(field.annotation) else f"{key}."
            yield from settings(inner, below, value if isinstance(value, inner) else None)


def _meaning(cls: type[Config], name: str) -> str:
    """Return the docstring of a field, "" without one; of the class that says it last, in one line."""
    owners = (_docstrings(base.__module__).get(base.__name__, {}) for base in cls.__mro__ if issubclass(base, Config))
    return next((found[name] for found in owners if name in found), "")


@functools.cache
def _docstrings(module: str) -> dict[str, dict[str, str]]:
    """Return the docstring of every field of a module's classes, by class and field.

    pydantic can do so as well, but parses a class when it is made, which no command but help needs.
    """
    classes = [it for it in ast.parse(inspect.getsource(sys.modules[module])).body if isinstance(it, ast.ClassDef)]
    return {cls.name: dict(_documented(cls.body)) for cls in classes}


def _documented(body: list[ast.stmt]) -> Iterator[tuple[str, str]]:
    for field, below in itertools.pairwise([*body, ast.Pass()]):
        match field, below:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                yield name, " ".join(text.split())
            case ast.AnnAssign(target=ast.Name(id=name)), _:
                yield name, ""


_BOUNDS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}


def _describe_type(field: Any) -> str:
    """The type of a field, with its bounds: `number, > 0`."""
    bounds = [
        f"{sign} {getattr(mark, name):g}"
        for mark in field.metadata
        for name, sign in _BOUNDS.items()
        if getattr(mark, name, None) is not None
    ]
    return ", ".join([_type_name(field.annotation), *bounds])


def _type_name(annotation: Any) -> str:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        return _type_name(arguments[0])
    if origin in (types.UnionType, typing.Union):
        return " or ".join(_type_name(argument) for argument in arguments)
    if origin is typing.Literal:
        return " | ".join(str(argument) for argument in arguments)
    if origin is dict:
        return "blocks by name"
    if origin in (list, tuple):
        return f"list of {_type_name(arguments[0])}"
    if annotation is type(None):
        return "null"
    if isinstance(annotation, type) and issubclass(annotation, Config):
        return "block"
    return {"str": "text", "int": "int", "float": "number", "bool": "true or false", "Path": "path"}.get(
        getattr(annotation, "__name__", ""), str(annotation)
    )


def _show_default(value: Any) -> str:
    if isinstance(value, Plugin):
        return value.type
    if isinstance(value, Config):
        return ""
    if isinstance(value, dict):
        return str(value["type"]) if "type" in value else "{" + ", ".join(value) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_show_default(item) for item in value) + "]"
    if value is None or value == "":
        return "null" if value is None else '""'
    return str(value).lower() if isinstance(value, bool) else str(value)
