"""What is printed: a table is never cut, however narrow the terminal."""

import re

import pytest
from rich.table import Table
from rich.text import Text

from diffusion_dpo import cli, console


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


FOREIGN = "[bold]a[/bold] :cat: [/x] \x1b[31mred\x1b]0;title\x07\r\b\x9b2J \u202egnp \ud800 end"
SHOWN = "[bold]a[/bold] :cat: [/x] \ufffd[31mred\ufffd]0;title\ufffd\ufffd\ufffd\ufffd2J \ufffdgnp \ufffd end"


@pytest.mark.parametrize("is_terminal", [False, True])
def test_what_others_wrote_is_shown_and_not_obeyed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, is_terminal: bool
) -> None:
    """Prompts, file names, columns and answers of servers: neither rich's markup nor the terminal's own."""
    monkeypatch.setattr(console._console, "_force_terminal", is_terminal)
    if is_terminal:
        monkeypatch.setenv("FORCE_COLOR", "1")
        monkeypatch.setattr(console._console, "_width", 300)
        monkeypatch.setattr(console._console, "_height", 50)
    table = Table(FOREIGN, title=FOREIGN, box=None)
    table.add_row(FOREIGN)
    table.add_row(Text(FOREIGN))
    console.say(FOREIGN)
    console.warn(FOREIGN)
    console.show(table)
    with console.progress(FOREIGN, 1, "images") as advance:
        advance(note=FOREIGN)
    out = re.sub("\x1b\\[[0-9;?]*[a-zA-Z]", "", capsys.readouterr().out)  # rich's own colours
    shown, once = (re.sub("\ufffd+", "\ufffd", text) for text in (out, SHOWN))  # in tables, rich drops some of them
    assert shown.count(once) >= (8 if is_terminal else 6)
    assert "\x1b" not in out and "\x07" not in out and "\x9b" not in out


def test_an_error_message_is_plain(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli._fail(f"no such column {FOREIGN}") == 2
    assert capsys.readouterr().err == f"error: no such column {SHOWN}\n"
