"""The settings of a verb as text: `key=default` on the left, type and meaning on the right, block after block."""

import textwrap
from collections.abc import Iterator

from diffusion_dpo import registry
from diffusion_dpo.config import Config
from diffusion_dpo.config_help import Setting, settings


def describe_settings(cls: type[Config], *, width: int) -> str:
    """Return the help text of every setting of a config class, wrapped to `width` columns."""
    rows = list(settings(cls))
    blocks = {row.key: row for row in rows if _top(row.key) == row.key and _inner(row.key, rows)}
    lines = ["Settings, as `key: value` in the YAML file or key=value here:"]
    for row in rows:
        if _top(row.key) == row.key and row.key not in blocks:
            lines += _entry(row.key, row, width)
    for key, block in blocks.items():
        lines += ["", *textwrap.wrap(f"{key}: {block.help}", width)]
        if block.table is not None:
            lines += _plugin_block(block, block.table, _inner(key, rows), width)
        else:
            for row in _inner(key, rows):
                if row.type != "block":  # its own settings follow
                    lines += _entry(row.key, row, width)
    return "\n".join(lines) + "\n"


def _plugin_block(block: Setting, table: str, rows: list[Setting], width: int) -> Iterator[str]:
    """The types of a plug-in and the settings of each."""
    is_list = block.default.startswith("[")
    key = block.key if is_list else f"{block.key}.type"
    types = Setting(
        key, "", block.default, f"{', '.join(registry.TABLES[table])}; or your own as package.module:Class"
    )
    yield from _entry(key, types, width)
    for name in registry.TABLES[table]:
        prefix = f"{block.key}[{name}]."
        summary = (registry.resolve(table, name).__doc__ or "").strip().splitlines()
        given = f"{{type: {name}}} in {block.key}" if is_list else f"{key}={name}"
        text = f"with {given}: {summary[0] if summary else ''}"
        yield from textwrap.wrap(text, width, initial_indent="  ", subsequent_indent=" " * 6)
        for row in rows:
            if row.key.startswith(prefix):
                leaf = row.key.removeprefix(prefix)
                yield from _entry(leaf if is_list else f"{block.key}.{leaf}", row, width, indent=4)


def _entry(key: str, row: Setting, width: int, *, indent: int = 2) -> Iterator[str]:
    """`key=default` and, in a column of their own, type and meaning."""
    column = 34 if width < 100 else 46
    left = " " * indent + (f"{key}=..." if row.default in ("required", "") else f"{key}={row.default}")
    kind = f"[{row.type}{', required' if row.default == 'required' else ''}] " if row.type else ""
    right = textwrap.wrap(kind + row.help, width - column, break_on_hyphens=False)
    if len(left) > width:  # an address, say
        name, _, value = left.partition("=")
        yield from (f"{name}=", " " * (indent + 2) + value)
    elif len(left) + 2 > column:
        yield left
    else:
        yield left.ljust(column) + right.pop(0)
    yield from (" " * column + line for line in right)


def _top(key: str) -> str:
    """The first part of a dotted key."""
    return key.partition(".")[0].partition("[")[0]


def _inner(key: str, rows: list[Setting]) -> list[Setting]:
    """The settings inside a block."""
    return [row for row in rows if row.key != key and _top(row.key) == key]
