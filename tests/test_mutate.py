"""The mutation run finds what can be broken, and leaves words, types and assertions alone."""

from scripts.mutants import Finder

SOURCE = '''"""A module."""
from collections.abc import Sequence

LIMIT = 2


def clip(values: "Sequence[float]", *, low: float = 0.5) -> list[float]:
    """Return the values, none below `low`."""
    assert low < LIMIT, "too low"
    if not values:
        raise ValueError(f"nothing to clip to {low + 1}")
    kept = [max(low, value) for value in values[:LIMIT] if value is not None]
    return sorted(kept, reverse=True)
'''


def test_every_change_is_of_one_place_and_compiles() -> None:
    found = Finder("module.py", SOURCE).found
    changes = {(SOURCE[mutant.start : mutant.end].strip(), mutant.text) for mutant in found}
    assert changes == {
        ("2", "3"),
        ("2", "(1)"),
        ("0.5", "1.0"),
        ("not values", "not (not values)"),
        ("not values", "(values)"),
        ('raise ValueError(f"nothing to clip to {low + 1}")', "pass"),
        ("max", "min"),
        ("LIMIT", "(LIMIT) + 1"),
        ("value is not None", "not (value is not None)"),
        ("is not", "is"),
        ("return sorted(kept, reverse=True)", "return None"),
        (", reverse=True", ""),
        ("True", "False"),
    }
    for mutant in found:
        compile(mutant.apply(SOURCE), "module.py", "exec")
    assert len({mutant.key(SOURCE) for mutant in found}) == len(found)
    assert {mutant.line for mutant in found if mutant.in_function} == {10, 11, 12, 13}
