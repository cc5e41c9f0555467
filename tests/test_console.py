"""What is printed: a table is never cut, however narrow the terminal."""

import pytest
from rich.table import Table

from diffusion_dpo import console


def test_no_number_of_a_table_is_cut(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    table = Table(box=None)
    cells = ["step120@0.5", "pocket_scene", "0.8601", "+0.0400, +0.0210 to +0.0590", "61 %"]
    for cell in cells:
        table.add_column(cell, no_wrap=True)
    table.add_row(*cells)
    console.show(table)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and all(cell in line for line in lines for cell in cells)
