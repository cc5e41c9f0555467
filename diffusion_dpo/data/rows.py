"""One row of somebody's data set to one PreferencePair, or to the reason why not: what all importers share.

Everything that can be said of a row alone is said here; images are decoded, and rows compared, in `collect.py`.
"""

import hashlib
import math
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
    fault = _prompt_fault(prompt)
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
    fault = _prompt_fault(prompt)
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


def _prompt_fault(prompt: Any) -> str:
    """Say what is wrong with a prompt, "" when nothing is."""
    if not isinstance(prompt, str) or not prompt.strip():
        return "no prompt" if prompt is None or isinstance(prompt, str) else "the prompt is not text"
    try:
        prompt.encode()
    except UnicodeEncodeError:
        return "the prompt is not valid Unicode"
    return ""


def make_labelled_pair(
    where: str, prompt: Any, images: tuple[Any, Any], label: Any, *, ties: Ties, source: str
) -> PreferencePair | Dropped:
    """Return the pair of a row with two images and `label`, the probability in [0, 1] that the first is better.

    A tie is dropped, or kept as a pair with `label_prob` 0.5.
    """
    if label is None:
        return Dropped(where, "no label")
    if isinstance(label, bool) or not isinstance(label, int | float):
        return Dropped(where, "the label is not a number")
    if not 0 <= label <= 1:
        return Dropped(where, "no label" if math.isnan(label) else "the label is not between 0 and 1")
    if label == 0.5 and ties == "drop":
        return Dropped(where, "tie", broken=False)
    chosen, rejected = images if label >= 0.5 else images[::-1]
    return make_pair(where, prompt, chosen, rejected, source=source, label_prob=max(float(label), 1 - label))
