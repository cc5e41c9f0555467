"""docs/scorers.md says what the registry says."""

import runpy
from pathlib import Path

from diffusion_dpo.registry import TABLES

ROOT = Path(__file__).parents[1]


def test_the_table_of_judges_is_up_to_date() -> None:
    script = runpy.run_path(str(ROOT / "scripts" / "bench_scorers.py"))
    page = (ROOT / "docs" / "scorers.md").read_text(encoding="utf-8")
    current = script["facts"]()
    assert page == script["replaced"](page, script["FACTS"], current), "run scripts/bench_scorers.py --facts"
    assert all(f"| `{name}` |" in current and f"### {name}\n" in current for name in TABLES["scorers"])
