"""What the values of a label say, decided once from all of them: which of two images is better, or if one is liked."""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from diffusion_dpo.config import ConfigError
from diffusion_dpo.data.columns import BETTER, WORSE
from diffusion_dpo.data.images import Unusable
from diffusion_dpo.data.rows import number

Meaning = Literal["probability", "winner_index"]
Names = tuple[Any, Any]
"""What a row calls its two images: their ids, or the models that drew them."""

_RARE = 0.05
"""Labels of up to this share may be of another kind; they cost their rows. More, and the kind is not known."""
_TIES = {"tie", "ties", "tied", "draw", "equal", "same", "both", "neither", "none", "no preference", "either"}
_SIDES = {"left": 0, "right": 1, "first": 0, "second": 1, "a": 0, "b": 1, "one": 0, "two": 1}
_THING = r"(?:image|img|jpg|picture|photo|option|model|candidate|response|side|the)"
_WORD = re.compile(rf"(?:{_THING}[ _-]?)*([a-z]+|[0-9]+)(?:[ _-]?{_THING})*")
_MOST_SHOWN = 6
_LIKED = {*BETTER, "yes", "y", "up", "upvote", "thumbs_up", "thumb_up", "pass"}
_DISLIKED = {*WORSE, "no", "n", "down", "downvote", "thumbs_down", "thumb_down", "fail"}
NO_LABEL, OTHER = Unusable("no label"), Unusable("a label unlike the others")

Seen = tuple[str, Any]
"""A value as it is compared: the kind that its type makes it, and what is left of it."""


@dataclass(frozen=True)
class _Coding:
    """A way to write labels: the probability that the first image is better for each value, and which values prove
    that it is this one and no other.
    """

    words: str
    read: Callable[[Seen], float | None]
    proof: frozenset[Seen] = frozenset()


def _table(kind: str, values: Mapping[Any, float]) -> Callable[[Seen], float | None]:
    return lambda seen: values.get(seen[1]) if seen[0] == kind else None


def _probability(seen: Seen) -> float | None:
    return seen[1] if seen[0] == "number" and 0 <= seen[1] <= 1 else None


_CODINGS = (
    _Coding("the probability that the first image is better", _probability),
    _Coding("-1 and 1", _table("number", {1: 1.0, -1: 0.0, 0: 0.5}), frozenset({("number", -1.0)})),
    _Coding("1 and 2", _table("number", {1: 1.0, 2: 0.0}), frozenset({("number", 2.0)})),
    _Coding("an index from 0", _table("index", {0: 1.0, 1: 0.0}), frozenset({("index", 0.0)})),
    _Coding("an index from 1", _table("index", {1: 1.0, 2: 0.0}), frozenset({("index", 2.0)})),
    _Coding("the name of a side", _table("side", {0: 1.0, 1: 0.0})),
)
_LIKES = (
    _Coding("1 and 0, or true and false", _table("number", {1: 1.0, 0: 0.0})),
    _Coding("1 and -1", _table("number", {1: 1.0, -1: 0.0, 0: 0.5}), frozenset({("number", -1.0)})),
    _Coding("words", _table("text", dict.fromkeys(_LIKED, 1.0) | dict.fromkeys(_DISLIKED, 0.0))),
)
"""The same of single images: the probability that one is liked; 0.5 is neither."""


@dataclass(frozen=True)
class Labels:
    """How the labels of a set are read."""

    coding: _Coding | None
    """None: by what the row calls its images."""
    meaning: Meaning
    only: str = ""
    """The one value that all rows have, where there is no other."""
    summary: str = ""
    """How they are read, and how often either image is better; {0} and {1} stand for the names of their columns."""

    def probability(self, value: Any, names: Sequence[Names] = ()) -> float | Unusable:
        """Return the probability that the first image of a row is better; Unusable where its label does not say."""
        seen = _seen(value, self.meaning)
        if seen is None:
            return NO_LABEL
        if seen[0] == "tie":
            return 0.5
        found = _by_names(value, names) if self.coding is None else self.coding.read(seen)
        return OTHER if found is None else found


def read_labels(column: str, rows: Iterable[tuple[Any, Sequence[Names]]], meaning: Meaning) -> Labels:
    """Decide how labels are read, from all of them and what each row calls its images.

    Raises ConfigError, showing the values, where they do not say which image is better.
    """
    values: Counter[str] = Counter()
    kinds: Counter[Seen] = Counter()
    named: Counter[float | None] = Counter()
    for value, names in rows:
        seen = _seen(value, meaning)
        if seen is not None:
            values[str(value)] += 1
            kinds[seen] += 1
            named[0.5 if seen[0] == "tie" else _by_names(value, names)] += 1
    total = values.total()
    if not total:
        return Labels(_CODINGS[0], meaning)
    for coding in _CODINGS:
        if coding.proof and (not coding.proof & kinds.keys() or _is_one_number(kinds)):
            continue
        found = _outcomes(coding, kinds)
        if found[None] <= _RARE * total:
            return Labels(coding, meaning, _only(values), _summary(coding.words, found) + _doubt(values, coding))
    if named[None] <= _RARE * total:
        return Labels(None, meaning, _only(values), _summary("the names of the two images", named))
    raise ConfigError(_refusal(column, values))


def read_likes(column: str, values: Iterable[Any]) -> Labels:
    """Decide from all labels of single images how they say that one is liked.

    Raises ConfigError, showing the values, where they do not say it.
    """
    shown: Counter[str] = Counter()
    kinds: Counter[Seen] = Counter()
    for value in values:
        seen = _seen(value, "probability")
        if seen is not None:
            shown[str(value)] += 1
            kinds[seen] += 1
    for coding in _LIKES:
        if coding.proof and not coding.proof & kinds.keys():
            continue
        found = _outcomes(coding, kinds)
        if found[None] <= _RARE * kinds.total():
            neither = f", {found[0.5]} neither" if found[0.5] else ""
            summary = f"read as {coding.words}; {found[1.0]} images are liked, {found[0.0]} are not{neither}"
            return Labels(coding, "probability", summary=summary)
    raise ConfigError(
        f"the values of {column!r} do not say which images are liked: {_shown(shown)}. Known are true and false, "
        "1 and 0, 1 and -1, and words such as good and bad, yes and no, like and dislike, up and down. Write one of "
        "them into the column"
    )


def _outcomes(coding: _Coding, kinds: Counter[Seen]) -> Counter[float | None]:
    """Count what values come to in a coding; None: they are not of it."""
    found: Counter[float | None] = Counter()
    for seen, count in kinds.items():
        found[0.5 if seen[0] == "tie" else coding.read(seen)] += count
    return found


def _is_one_number(kinds: Counter[Seen]) -> bool:
    """Whether one number is all there is, which proves no way of counting."""
    return len(kinds) == 1 and next(iter(kinds))[0] == "number"


def _only(values: Counter[str]) -> str:
    return next(iter(values)) if len(values) == 1 and values.total() > 1 else ""


def _doubt(values: Counter[str], coding: _Coding) -> str:
    """Name the setting that turns labels around which may as well be the winner's index."""
    either = coding is _CODINGS[0] and values.keys() <= {"0", "1"}
    return "; where 0 stands for {0}, set data.label_meaning=winner_index" if either else ""


def _summary(words: str, found: Counter[float | None]) -> str:
    first = sum(count for share, count in found.items() if share is not None and share > 0.5)
    second = sum(count for share, count in found.items() if share is not None and share < 0.5)
    return f"read as {words}; {{0}} is better in {first} rows, {{1}} in {second}"


def _refusal(column: str, values: Counter[str]) -> str:
    only = ", and one value alone does not say what it counts from" if len(values) == 1 else ""
    return (
        f"the values of {column!r} do not say which image is better: {_shown(values)}{only}. Known are a probability "
        "from 0 to 1 that the first is, true and false, -1 and 1, 1 and 2, left and right, first and second, a and b, "
        "image_0 and image_1, ids and models of the two images, tie; or data.label_meaning=winner_index, 0 for the "
        "first. Write one of them into the column"
    )


def _shown(values: Counter[str]) -> str:
    """Return the commonest values with their numbers."""
    shown = ", ".join(f"{count} x {value[:40]}" for value, count in values.most_common(_MOST_SHOWN))
    return shown + (", ..." if len(values) > _MOST_SHOWN else "")


def _seen(value: Any, meaning: Meaning) -> Seen | None:
    """Return a value as it is compared; None for one that is missing."""
    if value is None or value == "" or (isinstance(value, float) and value != value):
        return None
    text = str(value).strip().lower()
    if text in ("nan", "null", ""):
        return None
    if text in ("true", "false"):
        return "number", float(text == "true")
    found = number(value if not isinstance(value, str) else text)
    if found is not None:
        return ("index" if meaning == "winner_index" else "number"), found
    if text.replace("_", " ") in _TIES:
        return "tie", None
    match = _WORD.fullmatch(text)
    word = match.group(1) if match else text
    if word.isdigit():
        return "index", float(word)
    return ("side", _SIDES[word]) if word in _SIDES else ("text", re.sub(r"[ -]", "_", text))


def _by_names(value: Any, pairs: Sequence[Names]) -> float | None:
    """Return which of two different names a label repeats, 1.0 for the first; None for neither."""
    for first, second in pairs:
        if first != second and value in (first, second):
            return float(value == first)
    return None
