"""Imports point downwards: who may import whom, and what may be imported at the top of a module at all."""

import ast
import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from diffusion_dpo import registry

PACKAGE = Path(importlib.util.find_spec("diffusion_dpo").origin).parent
LAYERS = [
    {"registry", "interrupt", "other_names"},
    {"config", "config_help", "settings", "yaml_dialect", "files", "console", "pocket", "device", "processes", "web"},
    {"losses", "data", "models", "scorers", "strategies", "checkpoint", "tracking"},
    {"mixture", "sampling", "report", "pairing", "scoring"},
    {"card"},
    {"training", "exporting"},
    {"comparing"},
    {
        "generate",
        "score",
        "pair",
        "train",
        "compare",
        "export",
        "check",
        "push",
        "label",
        "inspect",
        "doctor",
        "dry_run",
        "power",
        "run_report",
    },
    {"demo", "find_beta"},  # verbs, one after the other
    {"cli", "cli_help", "launch", "__main__"},
]
LAYER_OF = {name: level for level, names in enumerate(LAYERS) for name in names}
SIBLINGS_MAY = {0, 1, len(LAYERS) - 1}
"""Layers whose modules may use each other: the foundations, and the command line."""
LATE = {"accelerate", "diffusers", "insightface", "lpips", "open_clip", "peft", "transformers"}
"""Libraries that take seconds to import: only inside the function that needs them."""
MODULES = sorted(PACKAGE.rglob("*.py"))


def imports(path: Path, *, top_level_only: bool) -> Iterator[tuple[str, int]]:
    """Yield (module, line) of every import; those under TYPE_CHECKING never run and are left out of the top level."""
    todo: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}:{node.lineno}: relative imports hide the layer"
            assert node.module is not None
            yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)
        elif top_level_only and (isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or is_type_checking(node)):
            continue
        todo.extend(ast.iter_child_nodes(node))


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def part_of(module: str) -> str | None:
    """The part of the package that a dotted name belongs to, None for a library and for the package itself."""
    parts = module.split(".")
    return parts[1] if parts[0] == "diffusion_dpo" and len(parts) > 1 else None


def name_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def test_every_module_has_a_layer() -> None:
    assert {name_of(path) for path in MODULES} - {"__init__"} <= set(LAYER_OF)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path: Path) -> None:
    here = name_of(path)
    if here == "__init__":  # lends every public name, lazily
        return
    for module, line in imports(path, top_level_only=False):
        there = part_of(module)
        if there is None or there == here or there.startswith("__"):
            continue
        downwards = LAYER_OF[there] < LAYER_OF[here]
        sibling = LAYER_OF[there] == LAYER_OF[here] and LAYER_OF[here] in SIBLINGS_MAY
        assert downwards or sibling, f"{path.name}:{line}: {here} must not import {there}"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_slow_libraries_are_imported_late(path: Path) -> None:
    for module, line in imports(path, top_level_only=True):
        assert module.split(".")[0] not in LATE, (
            f"{path.name}:{line}: import {module} inside the function that needs it"
        )


@pytest.mark.parametrize("part", ["config", "settings", "report", "registry", "files", "console", "cli", "cli_help"])
def test_these_never_import_torch(part: str) -> None:
    paths = [path for path in MODULES if name_of(path) == part]
    assert paths
    for path in paths:
        for module, line in imports(path, top_level_only=False):
            assert module.split(".")[0] not in LATE | {"torch", "torchvision"}, f"{path.name}:{line}"


def test_every_plug_in_is_imported_without_torch() -> None:
    """What a typo in a plug-in's settings waits for; in one fresh process, since ours has torch already."""
    targets = sorted({target for table in registry.TABLES.values() for target in table.values()})
    program = (
        "import importlib, sys\n"
        f"for target in {targets!r}:\n"
        "    module, _, name = target.partition(':')\n"
        "    getattr(importlib.import_module(module), name)\n"
        f"    late = {sorted(LATE | {'torch', 'torchvision'})!r}\n"
        "    assert not (heavy := [n for n in late if n in sys.modules]), (target, heavy)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_no_file_is_two() -> None:
    long = {str(path.relative_to(PACKAGE)): n for path in MODULES if (n := len(path.read_text().splitlines())) > 400}
    assert not long
