"""Rows of CSV and TSV, and which column of a table holds prompts."""

import csv
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from diffusion_dpo.config import ConfigError
from diffusion_dpo.data.columns import spelling
from diffusion_dpo.data.text import encoding_of


def text_column(names: Iterable[str], asked: str | None = None) -> str | None:
    """Return which of a table's columns holds the prompts: the one asked for, or one of columns.PROMPT, if any."""
    present = list(names)
    if asked is not None:
        return asked if asked in present else None
    return spelling("prompt", present)


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

    Raises ConfigError for a row with more values than there are columns: a comma within a prompt needs quotes.
    """
    for where, row in read_csv(file):
        if isinstance(row, str):
            raise ConfigError(f"{where} has {row}; put values that contain the separator in quotes")
        yield where, row


def read_csv(file: Path) -> Iterator[tuple[str, dict[str, str] | str]]:
    """Yield the same with, in place of a row with too many values, the words on it; few rows are in memory at a time.

    In a .tsv a quotation mark is text. A .csv may be separated by semicolons or tabs, as spreadsheets have it.
    """
    try:
        with file.open("rb") as raw:
            encoding = encoding_of(raw.read(4))
        with file.open(encoding=encoding, newline="") as stream:
            head = stream.readline()
            stream.seek(0)
            if file.suffix.lower() == ".tsv":
                rows = csv.reader(stream, delimiter="\t", quoting=csv.QUOTE_NONE)
            else:
                separator = next((it for it in ",;\t" if it in head), ",")
                rows = csv.reader(stream, delimiter=separator, strict=True)
            names = [name.strip() for name in next(rows, [])]
            for row in rows:
                where = f"{file.name} line {rows.line_num}"
                if any(value.strip() for value in row[len(names) :]):
                    yield where, f"{len(row)} values for {len(names)} columns ({', '.join(names)})"
                elif any(value.strip() for value in row):
                    yield where, dict(zip(names, row + [""] * len(names), strict=False))
    except (OSError, UnicodeError, csv.Error) as error:
        raise ConfigError(f"cannot read {file}: {getattr(error, 'strerror', None) or error}") from None
