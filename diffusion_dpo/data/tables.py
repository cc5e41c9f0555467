"""Rows of CSV and TSV, and which column of a table holds prompts."""

import csv
import io
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from diffusion_dpo.config import ConfigError
from diffusion_dpo.data.text import decode_text

PROMPT_COLUMNS = ("prompt", "text", "caption", "prompts", "captions")
"""What columns of prompts are called, in whatever case; the first that is there counts."""


def text_column(names: Iterable[str], asked: str | None = None) -> str | None:
    """Return which of a table's columns holds the prompts: the one asked for, or one of PROMPT_COLUMNS, if any."""
    present = list(names)
    if asked is not None:
        return asked if asked in present else None
    by_name = {name.strip().lower(): name for name in reversed(present)}
    return next((by_name[name] for name in PROMPT_COLUMNS if name in by_name), None)


def prompt_value(value: Any) -> tuple[str, str]:
    """Return the prompt that a value of a column holds, or why there is none."""
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if isinstance(value, str) and value.strip():
        return value.strip(), ""
    if value is None or value == "" or isinstance(value, str):
        return "", "no prompt"
    if isinstance(value, list):
        return "", f"{len(value)} prompts for one image"
    return "", "the prompt is not text"


def read_table(file: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield where it is, and the row, of every row of a .csv or .tsv whose first line names the columns.

    In a .tsv a quotation mark is text. A .csv may be separated by semicolons or tabs, as spreadsheets have it. Raises
    ConfigError for a row with more values than there are columns: a comma within a prompt needs quotes.
    """
    try:
        text = decode_text(file.read_bytes())
        head = text.partition("\n")[0]
        if file.suffix.lower() == ".tsv":
            rows = csv.reader(io.StringIO(text, newline=""), delimiter="\t", quoting=csv.QUOTE_NONE)
        else:
            separator = next((it for it in ",;\t" if it in head), ",")
            rows = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
        names = [name.strip() for name in next(rows, [])]
        for row in rows:
            where = f"{file.name} line {rows.line_num}"
            if any(value.strip() for value in row[len(names) :]):
                raise ConfigError(
                    f"{where} has {len(row)} values for {len(names)} columns ({', '.join(names)}); put values that "
                    "contain the separator in quotes"
                )
            if any(value.strip() for value in row):
                yield where, dict(zip(names, row + [""] * len(names), strict=False))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"cannot read {file}: {getattr(error, 'strerror', None) or error}") from None
