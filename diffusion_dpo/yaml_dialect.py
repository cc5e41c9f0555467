"""YAML as people mean it, read and written: what configs and settings on the command line are spelt in."""

import re
from typing import Any

import yaml


class Loader(yaml.SafeLoader):
    """Reads as people mean it. YAML 1.1 reads 1e-8 as text, `on` as true, 1:30 as 90, 010 as 8, 2026-11-23 as a date,
    and of two equal keys the second silently wins.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Refuse a key that is set twice."""
        keys = [key.value for key, _ in node.value]
        twice = next((key for position, key in enumerate(keys) if key in keys[:position]), None)
        if twice is not None:
            raise yaml.constructor.ConstructorError(None, None, f"{twice} is set twice", node.start_mark)
        mapping: dict[Any, Any] = super().construct_mapping(node, deep)
        return mapping


_SCALARS = {
    "bool": (r"(?:true|True|false|False)$", "tTfF"),
    "int": (r"[-+]?(?:0|[1-9][\d_]*)$", "-+0123456789"),
    "float": (
        r"[-+]?(?:\d[\d_]*\.\d*(?:[eE][-+]?\d+)?|\d[\d_]*[eE][-+]?\d+|\.\d+(?:[eE][-+]?\d+)?|\.(?:inf|nan))$",
        "-+0123456789.",
    ),
}
_REPLACED = {f"tag:yaml.org,2002:{name}" for name in (*_SCALARS, "timestamp")}
Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in _REPLACED]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _name, (_pattern, _first) in _SCALARS.items():
    Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", re.compile(_pattern), list(_first))


class Dumper(yaml.SafeDumper):
    """Quotes the text that Loader would take for something else."""

    yaml_implicit_resolvers = Loader.yaml_implicit_resolvers
