"""The names under which people keep the same thing in their rows, and rows of Parquet under the names used here."""

import difflib
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

PROMPT = (
    *("prompt", "text", "caption", "prompts", "captions", "text_prompt", "prompt_text", "image_prompt", "description"),
)
"""The columns that a prompt is found in, in whatever case; the first that is there."""
_SPELLINGS = {
    "prompt": PROMPT,
    "image": ("image", "image_file_name", "file_name"),
    "rank": ("rank", "ranks", "ranking", "human_preference"),
}
BETTER = (
    *(
        "chosen",
        "w",
        "win",
        "wins",
        "winner",
        "winners",
        "won",
        "good",
        "better",
        "best",
        "preferred",
        "liked",
        "like",
    ),
    *("accepted", "positive", "pos"),
)
WORSE = (
    *("rejected", "reject", "l", "lose", "loses", "loser", "losers", "lost", "bad", "worse", "worst", "dispreferred"),
    *("unpreferred", "not_preferred", "disliked", "dislike", "negative", "neg"),
)
"""Words that say of an image, or of a folder of images, which one it is; kohya's are w and l."""


def spellings(key: str) -> tuple[str, ...]:
    """Return the names that stand for a column: its own, then the others; `chosen_file_name` as `datasets` has it."""
    return _SPELLINGS.get(key, (key, f"{key}_file_name"))


def spelling(key: str, present: Collection[str]) -> str | None:
    """Return the name under which a column is there, None when it is not."""
    by_name = {name.strip().lower(): name for name in reversed(list(present))}
    return next((by_name[name] for name in spellings(key) if name in by_name), None)


def respell(row: Mapping[str, Any], keys: Sequence[str]) -> dict[str, Any]:
    """Return a row with those of the keys, too, that it has under another name."""
    found = dict(row)
    for key in keys:
        name = spelling(key, row)
        if name is not None and name != key:
            found[key] = row[name]
    return found


def _nearest(key: str, present: Collection[str]) -> str:
    """Return the name of a missing column that comes nearest to one that is there."""
    near = (name for name in spellings(key) if difflib.get_close_matches(name, present, n=1, cutoff=0.5))
    return next(near, key)


def spelled_rows(
    file: Path, keys: Sequence[str], optional: Sequence[str] = ()
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield where it is, and the columns `keys` and those of the optional ones that are there, of a Parquet's rows.

    Raises ConfigError when one of the keys is there under no name.
    """
    from diffusion_dpo.data import shards

    present = shards.column_names(file)
    names = {key: spelling(key, present) or _nearest(key, present) for key in keys}
    names |= {key: name for key in optional if (name := spelling(key, present))}
    for where, row in shards.located_rows(file, list(names.values())):
        yield where, {key: row[name] for key, name in names.items()}
