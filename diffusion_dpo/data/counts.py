"""Votes for two images -> the probability that the first is better, which no small number of votes makes certain."""

import json
from typing import Any

from diffusion_dpo.data.images import Unusable
from diffusion_dpo.data.rows import number


def smoothed_share(for_first: float, total: float) -> float:
    """Return (for_first + 1) / (total + 2), Laplace's rule of succession: the mean of what the share may be, when all
    shares were equally likely before the votes. One vote of one is 2/3, ten of ten 11/12.
    """
    return (for_first + 1) / (total + 2)


def share_of_counts(first: Any, second: Any) -> float | Unusable:
    """Return the smoothed share of two numbers of votes."""
    ours, theirs = number(first), number(second)
    if ours is None or theirs is None:
        return Unusable("no label" if first is None or second is None else "the votes are not numbers")
    if min(ours, theirs) < 0:
        return Unusable("fewer than 0 votes")
    return smoothed_share(ours, ours + theirs) if ours + theirs else Unusable("no votes")


def share_of_shares(first: Any, second: Any, num_votes: int) -> float | Unusable:
    """Return the smoothed share of two shares of `num_votes` votes; they may add up to 1 or to 100."""
    ours, theirs = number(first), number(second)
    if ours is None or theirs is None:
        return Unusable("no label" if first is None or second is None else "the shares are not numbers")
    if min(ours, theirs) < 0 or ours + theirs <= 0:
        return Unusable("the shares are below 0" if min(ours, theirs) < 0 else "no votes")
    return smoothed_share(ours / (ours + theirs) * num_votes, num_votes)


def num_votes_of(value: Any) -> int | None:
    """Return the number of votes that a value lists: a list, an object with `votes`, or JSON of one; None for none."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return None
    votes = value.get("votes") if isinstance(value, dict) else value
    return len(votes) or None if isinstance(votes, list) else None
