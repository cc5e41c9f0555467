"""One row of somebody's data set to one PreferencePair, or to the reason why not: what all importers share.

Everything that can be said of a row alone is said here; images are decoded, and rows compared, in `collect.py`.
"""

import hashlib
import math
import sys
from dataclasses import replace
from typing import Any, Literal

from diffusion_dpo.data import Dropped, PreferencePair
from diffusion_dpo.data.images import BrokenImage, image_bytes

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
    """Return a single image with `label`, whether it is liked, as a pair whose other side is empty."""
    fault = prompt_fault(prompt)
    if fault:
        return Dropped(where, fault)
    if label not in (0, 1, False, True):
        return Dropped(where, "no label" if label is None else "the label is neither true nor false")
    try:
        data = image_bytes(image)
    except BrokenImage as error:
        return Dropped(where, f"image: {error}")
    chosen, rejected = (data, b"") if label else (b"", data)
    return PreferencePair(pair_id(prompt, chosen, rejected), prompt, chosen, rejected, source=source, where=where)


def prompt_fault(prompt: Any) -> str:
    """Say what is wrong with a prompt, "" when nothing is."""
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
    """Return the pair of a row with two images and `label`, the probability in [0, 1] that the first is better.

    A tie is dropped, or kept as a pair with `label_prob` 0.5. The origins keep which image was the first (`position`
    0) and which the second (1), and the models where they are known.
    """
    if label is None:
        return Dropped(where, "no label")
    if isinstance(label, bool) or not isinstance(label, int | float):
        return Dropped(where, "the label is not a number")
    if not 0 <= label <= 1:
        return Dropped(where, "no label" if math.isnan(label) else "the label is not between 0 and 1")
    if label == 0.5 and ties == "drop":
        return Dropped(where, "tie", broken=False)
    chosen, rejected = (0, 1) if label >= 0.5 else (1, 0)
    label_prob = max(float(label), 1 - label)
    pair = make_pair(where, prompt, images[chosen], images[rejected], source=source, label_prob=label_prob)
    if isinstance(pair, Dropped):
        return pair
    origins = [{"position": position, **origin_of(models[position])} for position in (chosen, rejected)]
    return replace(pair, chosen_origin=origins[0], rejected_origin=origins[1])
