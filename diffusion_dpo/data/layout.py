"""What the columns of a table of preferences mean, by their names alone: settings for `data.type=hub`.

Two columns belong together when their names differ in one word that names a side: `image_0` and `image_1`,
`votes_image1` and `votes_image2`, `chosen_model` and `rejected_model`. What is left of the name says what they hold.
"""

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from diffusion_dpo.data.columns import spelling

_EQUALS = (("0", "1"), ("1", "2"), ("a", "b"), ("left", "right"), ("first", "second"))
_RANKED = (
    *(("chosen", "rejected"), ("winner", "loser"), ("win", "lose"), ("w", "l"), ("preferred", "dispreferred")),
    *(("preferred", "rejected"), ("better", "worse"), ("best", "worst"), ("good", "bad"), ("positive", "negative")),
    *(("pos", "neg"), ("accepted", "rejected")),
)
"""The words of the two sides; of the second kind the first side is the better one."""
_BEYOND = {("0", "1"): ("2",), ("1", "2"): ("0", "3"), ("a", "b"): ("c",), ("first", "second"): ("third",)}
"""Where a column of this word stands beside the two, there are more than two sides."""
_IMAGE = {"image", "images", "img", "jpg", "jpeg", "png", "picture", "photo", "bytes", "base64", "b64"}
_FILE = {"file", "filename", "name", "path"}
_MODEL = {"model", "generator", "checkpoint"}
_SCORE = {"score", "reward", "rating"}
_VOTE = {"vote", "votes"}
_SHARE = {"share", "fraction", "ratio", "weighted"}
_FILLING = {"num", "number", "n", "count", "results", "preference", "pref", "source", "of", "for", "overall", "human"}
_IDENTITY = {"uid", "id", "uuid", "hash"}
_PROBABILITIES = ("label", "labels", "preference", "pref", "human_preference", "prob", "probability")
_WINNERS = (
    *("winner", "winner_index", "winner_idx", "winner_id", "best", "best_image", "best_index", "best_idx"),
    *("better", "better_image", "preferred", "preferred_image", "choice", "chosen", "chosen_index", "selected"),
    *("best_image_uid", "winner_uid", "answer", "verdict", "vote"),
)
"""The names of a column that says which of two images won, the likeliest first."""
_VOTES_BEHIND = ("detailed_results_preference", "detailed_results")

Pair = tuple[str, str]


@dataclass(frozen=True)
class _Sides:
    """Two columns, one of each side; `rest` are the other words of their names."""

    names: Pair
    rest: frozenset[str]
    words: Pair


def find_settings(columns: Collection[str], *, files: bool = False) -> dict[str, Any] | None:
    """Return the settings of `data.type=hub` that read a table with these columns; None when it holds no pairs.

    `files`: the images are names of files, not bytes.
    """
    prompt = spelling("prompt", columns)
    image_words = _IMAGE | _FILE if files else _IMAGE
    found: dict[str, Any] = {"prompt_column": prompt}
    for sides, ranked in ((_RANKED, True), (_EQUALS, False)):
        pairs = list(_pairs(columns, sides))
        images = min((it for it in pairs if it.rest <= image_words), key=_by_shortness, default=None)
        if prompt is None or images is None:
            continue
        about = [it for it in pairs if it.words == images.words and it != images]
        models = _first(about, _MODEL, _MODEL | image_words | _FILLING | {"name"})
        found |= {"model_columns": models} if models else {}
        if ranked:
            scores = _first(about, _SCORE, _SCORE | image_words | _FILLING)
            return found | {
                "chosen_column": images.names[0],
                "rejected_column": images.names[1],
                **({"score_columns": scores} if scores else {}),
            }
        evidence = _evidence(columns, images, about, image_words)
        if evidence is not None:
            return found | {"image_0_column": images.names[0], "image_1_column": images.names[1]} | evidence
    return None


@lru_cache(maxsize=64)
def model_columns(columns: frozenset[str]) -> Pair | None:
    """Return the columns that name the models of the better and the worse image, if any."""
    about = [it for it in _pairs(columns, _RANKED) if it.words == _RANKED[0]]
    return _first(about, _MODEL, _MODEL | _IMAGE | _FILLING | {"name"})


def describe_nearest(columns: Collection[str]) -> str:
    """Return what a table lacks to be read as pairs, in a sentence; "" when it resembles nothing."""
    images = [it for sides in (_RANKED, _EQUALS) for it in _pairs(columns, sides) if it.rest <= _IMAGE | _FILE]
    if images:
        first, second = min(images, key=_by_shortness).names
        if spelling("prompt", columns) is None:
            return f"{first} and {second} look like two images, and there is no prompt: data.prompt_column names it"
        return (
            f"{first} and {second} look like two images, and no column says which is better: data.label_column, "
            "data.votes_columns or data.score_columns names it"
        )
    if spelling("prompt", columns):
        return "there is a prompt, and no two columns whose names differ only in the side, such as image_0 and image_1"
    return ""


def identity_columns(columns: Collection[str], images: Pair) -> list[Pair]:
    """Return the pairs of columns that name the two images, or the models they are of: a label may repeat them."""
    words = [it.words for sides in (_RANKED, _EQUALS) for it in _pairs(columns, sides) if it.names == images]
    about = [it for it in _pairs(columns, _EQUALS) if it.words in words]
    return [it.names for it in about if it.rest & (_IDENTITY | _MODEL | _FILE)]


def _evidence(
    columns: Collection[str], images: _Sides, about: list[_Sides], image_words: set[str]
) -> dict[str, Any] | None:
    """Return the settings of what says which image is better: a label, votes, shares of votes, or scores."""
    filling = image_words | _FILLING
    label = next((it for it in about if it.rest == {"label"}), None)
    first_label = f"label_{images.words[0]}" if label is None else label.names[0]
    for name in (first_label, *_PROBABILITIES, *_WINNERS):
        if name in columns and name not in images.names:
            return {"label_column": name} | ({"label_meaning": "winner_index"} if name in _WINNERS else {})
    votes = _first(about, _VOTE, _VOTE | filling)
    if votes:
        return {"votes_columns": votes}
    shares = _first(about, _SHARE, _SHARE | _VOTE | filling)
    if shares:
        behind = next((name for name in _VOTES_BEHIND if name in columns), None)
        return {"share_columns": shares} | ({"share_votes_column": behind} if behind else {})
    scores = _first(about, _SCORE, _SCORE | filling)
    return {"score_columns": scores} if scores else None


def _pairs(columns: Iterable[str], sides: Iterable[Pair]) -> Iterable[_Sides]:
    """Yield every two columns whose names differ in the words of one side; not of three or more of a kind."""
    by_words = {_words(name): name for name in sorted(columns)}
    for words, name in by_words.items():
        for first, second in sides:
            for place in (i for i, word in enumerate(words) if word == first):
                before, after = words[:place], words[place + 1 :]
                other = by_words.get((*before, second, *after))
                more = [word for word in _BEYOND.get((first, second), ()) if (*before, word, *after) in by_words]
                if other is not None and not more:
                    yield _Sides((name, other), frozenset(before + after), (first, second))


def _first(pairs: list[_Sides], needed: set[str], allowed: set[str]) -> Pair | None:
    """Return the pair with the shortest names that has a word that is needed, and none that is not allowed."""
    found = [it for it in pairs if it.rest & needed and it.rest <= allowed]
    return min(found, key=_by_shortness).names if found else None


def _by_shortness(pair: _Sides) -> tuple[int, Pair]:
    return len(pair.rest), pair.names


def _words(name: str) -> tuple[str, ...]:
    """Split a name into lower-case words and numbers: `votes_image1`, `votesImage1` and `votes-image-1` are alike."""
    spaced = re.sub(r"([a-z0-9])([A-Z])", r"\1_\2", name)
    return tuple(re.findall(r"[a-z]+|[0-9]+", spaced.lower()))
