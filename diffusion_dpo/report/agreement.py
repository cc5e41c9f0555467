"""Do judges agree? Kendall's tau of their orders of the images of one prompt, averaged over prompts.

Whether a prompt's images are good in general says nothing here; only how they are ordered under their own prompt.
tau-b (Kendall, Biometrika 33, 1945) of two metrics is sum_ij sign(a_i - a_j) sign(b_i - b_j), divided by the root of
the numbers of pairs of images that a and that b tell apart: 1 the same order, 0 none in common, -1 the reverse.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from diffusion_dpo.report import Interval
from diffusion_dpo.report.statistics import mean_interval

_IMAGES_AT_MOST = 300


@dataclass(frozen=True)
class Tau:
    """Kendall's tau of two metrics, mean over the prompts in which both tell at least two images apart."""

    first: str
    second: str
    mean: float | None
    interval: Interval | None
    num_prompts: int


def agreement(
    prompts: Iterable[Sequence[Mapping[str, float]]], metrics: Sequence[str], *, lower_is_better: frozenset[str]
) -> list[Tau]:
    """Return the tau of every two metrics. `prompts` yields, for each prompt, the scores of its distinct images.

    Values of metrics in `lower_is_better` are turned round first. An image counts where both metrics have a score; of
    more than 300 images of a prompt, 300.
    """
    if len(metrics) < 2:
        return []
    signs = np.array([-1.0 if name in lower_is_better else 1.0 for name in metrics])
    taus = []
    for images in prompts:
        few = images[:: -(-len(images) // _IMAGES_AT_MOST) or 1]
        values = np.array([[image.get(name, np.nan) for image in few] for name in metrics])
        taus.append(_tau_b(signs[:, None] * np.where(np.isfinite(values), values, np.nan)))
    table = np.array(taus).reshape(len(taus), len(metrics), len(metrics))
    found = []
    for i in range(len(metrics)):
        for j in range(i + 1, len(metrics)):
            known = table[:, i, j][np.isfinite(table[:, i, j])]
            mean = float(known.mean()) if known.size else None
            found.append(Tau(metrics[i], metrics[j], mean, mean_interval(known), known.size))
    return found


def _tau_b(values: np.ndarray) -> np.ndarray:
    """Return tau-b of every two rows of (num_metrics, num_images), NaN where one of them tells no images apart."""
    first, second = np.triu_indices(values.shape[1], 1)
    order = np.sign(values[:, first] - values[:, second])
    known = np.isfinite(order)
    order = np.where(known, order, 0.0)
    apart = np.abs(order) @ known.T.astype(float)  # [a, b]: pairs of images that a tells apart and b has scored
    product = np.sqrt(apart * apart.T)
    with np.errstate(invalid="ignore"):
        return np.asarray(np.where(product > 0, order @ order.T / np.where(product > 0, product, 1), np.nan))
