"""One row of somebody's data set to one PreferencePair, or to the reason why not: what all importers share.

Everything that can be said of a row alone is said here; images are decoded, and rows compared, in `collect.py`.
"""

import hashlib
import itertools
import json
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from decimal import Decimal
from numbers import Real
from typing import Any, Literal

from diffusion_dpo.data import Dropped, PreferencePair
from diffusion_dpo.data.images import BrokenImage, Unusable, image_bytes, is_bytes_as_numbers

Ties = Literal["drop", "keep"]


def pair_id(prompt: str, chosen: bytes, rejected: bytes, mask: bytes = b"") -> str:
    """Return the id of a pair, 32 hex digits, from its prompt, its two encoded images and its mask."""
    digest = hashlib.sha256()
    for part in (prompt.encode(), chosen, rejected, *([mask] if mask else [])):
        digest.update(len(part).to_bytes(8, "big"))
        digest.update(part)
    return digest.hexdigest()[:32]


def make_pair(
    where: str, prompt: Any, chosen: Any, rejected: Any, *, source: str, mask: Any = None, label_prob: float = 1.0
) -> PreferencePair | Dropped:
    """Return the pair of a row as it was found: a prompt and two values of image columns, of any type; perhaps a mask.

    Both images go through together, so a broken one can never leave its partner to a neighbour.
    """
    prompt = prompt_text(prompt)
    fault = prompt_fault(prompt)
    if fault:
        return Dropped(where, fault)
    images: list[bytes] = []
    for side, value in (("chosen", chosen), ("rejected", rejected), *([("mask", mask)] if mask is not None else [])):
        try:
            images.append(image_bytes(value))
        except BrokenImage as error:
            return Dropped(where, f"{side}: {error}")
    identity = pair_id(prompt, *images)
    return PreferencePair(
        identity,
        prompt,
        images[0],
        images[1],
        label_prob=label_prob,
        source=source,
        where=where,
        mask=images[2] if mask is not None else b"",
    )


def make_labelled_image(where: str, prompt: Any, image: Any, label: Any, *, source: str) -> PreferencePair | Dropped:
    """Return a single image with `label`, whether it is liked, as a pair whose other side is empty.

    Of the probability that it is liked, as `labels.Labels` reads it, 0.5 is neither.
    """
    prompt = prompt_text(prompt)
    fault = prompt_fault(prompt)
    if fault:
        return Dropped(where, fault)
    if isinstance(label, Unusable):
        return Dropped(where, str(label))
    if label == 0.5:
        return Dropped(where, "neither liked nor disliked", broken=False)
    if label not in (0, 1, False, True):
        return Dropped(where, "no label" if label is None else "the label is neither true nor false")
    try:
        data = image_bytes(image)
    except BrokenImage as error:
        return Dropped(where, f"image: {error}")
    chosen, rejected = (data, b"") if label else (b"", data)
    return PreferencePair(pair_id(prompt, chosen, rejected), prompt, chosen, rejected, source=source, where=where)


def prompt_text(prompt: Any) -> Any:
    """Return the text of a prompt that is a chat, a list of `role` and `content` with one message of the user's; any
    other prompt as it is. `content` may be a list of parts, of which those with a `text` are joined.
    """
    if isinstance(prompt, str) and prompt.startswith('[{"'):
        with suppress(ValueError, RecursionError):
            prompt = json.loads(prompt)
    if not isinstance(prompt, list) or not prompt:
        return prompt
    if not all(isinstance(it, dict) and "content" in it for it in prompt):
        return Unusable("a list, but not of messages with role and content")
    said = [it["content"] for it in prompt if it.get("role", "user") in ("user", "human")]
    if len(said) != 1:
        return Unusable("a chat without a message of the user, or with several")
    if isinstance(said[0], str):
        return said[0]
    parts = said[0] if isinstance(said[0], list) else []
    texts = [it["text"] for it in parts if isinstance(it, dict) and isinstance(it.get("text"), str)]
    return "\n".join(texts) if texts else Unusable("a chat whose message of the user has no text")


def prompt_fault(prompt: Any) -> str:
    """Say what is wrong with a prompt, "" when nothing is."""
    if isinstance(prompt, Unusable):
        return f"prompt: {prompt}"
    if not isinstance(prompt, str) or not prompt.strip():
        return "no prompt" if prompt is None or isinstance(prompt, str) else "the prompt is not text"
    try:
        prompt.encode()
    except UnicodeEncodeError:
        return "the prompt is not valid Unicode"
    return ""


def is_number(value: Any) -> bool:
    """Whether a value of a row is a number that can be reckoned with: no text, no truth value, not NaN or infinite."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def number(value: Any) -> float | None:
    """Return the number that a value of a row stands for, of whatever type: decimal, of NumPy, digits as text; None
    for anything else, truth values, NaN and infinity among it.
    """
    if isinstance(value, bool) or not isinstance(value, str | Decimal | Real):
        return None
    try:
        found = float(value)
    except (ValueError, OverflowError):
        return None
    return found if abs(found) <= sys.float_info.max else None


def origin_of(model: Any) -> dict[str, Any]:
    """Return what is known of an image's origin where a column names the model that drew it, or does not."""
    return {"model": model} if isinstance(model, str) and model else {}


def make_labelled_pair(
    where: str,
    prompt: Any,
    images: tuple[Any, Any],
    label: Any,
    *,
    ties: Ties,
    source: str,
    models: tuple[Any, Any] = (None, None),
) -> PreferencePair | Dropped:
    """Return the pair of a row with two images and `label`, the probability in [0, 1] that the first is better; true
    and false are 1 and 0.

    A tie is dropped, or kept as a pair with `label_prob` 0.5. The origins keep which image was the first (`position`
    0) and which the second (1), and the models where they are known.
    """
    if isinstance(label, Unusable):
        return Dropped(where, str(label))
    share = float(label) if isinstance(label, bool) else number(label)
    if share is None:
        missing = label is None or (isinstance(label, float) and label != label)
        return Dropped(where, "no label" if missing else "the label is not a number")
    if not 0 <= share <= 1:
        return Dropped(where, "the label is not between 0 and 1")
    if share == 0.5 and ties == "drop":
        return Dropped(where, "tie", broken=False)
    chosen, rejected = (0, 1) if share >= 0.5 else (1, 0)
    pair = make_pair(where, prompt, images[chosen], images[rejected], source=source, label_prob=max(share, 1 - share))
    if isinstance(pair, Dropped):
        return pair
    origins = [{"position": position, **origin_of(models[position])} for position in (chosen, rejected)]
    return replace(pair, chosen_origin=origins[0], rejected_origin=origins[1])


def each_of(where: str, chosen: Any, rejected: Any) -> Iterator[tuple[str, Any, Any]]:
    """Yield every pair of a row whose better or worse side is a list of images, with its place; of another row one."""
    sides: list[list[tuple[int | None, Any]]] = [
        list(enumerate(it)) if isinstance(it, list) and it and not is_bytes_as_numbers(it) else [(None, it)]
        for it in (chosen, rejected)
    ]
    for (i, better), (j, worse) in itertools.product(*sides):
        place = "".join(f", {side} {n}" for side, n in (("chosen", i), ("rejected", j)) if n is not None)
        yield where + place, better, worse
