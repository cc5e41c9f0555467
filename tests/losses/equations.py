"""The equation of every objective, as its paper has it, in 40 digits: what the float code is held against.

Written with nothing of the package, on one example at a time. Naive forms such as log(1 / (1 + exp(-u))) are exact at
this precision, for any u.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from mpmath import exp, log, mp, mpf

from diffusion_dpo.losses import ImageErrors, Loss
from diffusion_dpo.losses.capo import CaPO
from diffusion_dpo.losses.dco import DCO
from diffusion_dpo.losses.dmpo import DMPO
from diffusion_dpo.losses.dpo import DPO
from diffusion_dpo.losses.dpo_shift import DPOShift
from diffusion_dpo.losses.hinge import Hinge
from diffusion_dpo.losses.ipo import IPO
from diffusion_dpo.losses.kto import KTO
from diffusion_dpo.losses.linear_dpo import LinearDPO
from diffusion_dpo.losses.mapo import MaPO
from diffusion_dpo.losses.plackett_luce import PlackettLuce
from diffusion_dpo.losses.rank_dpo import RankDPO
from diffusion_dpo.losses.robust_dpo import RobustDPO
from diffusion_dpo.losses.sft import SFT

mp.dps = 40
BETA = 200
"""With errors below 0.03 this makes margins of up to 6 either way."""
INFINITY = float("inf")
NUM_IMAGES = {"pair": 2, "image": 1, "chosen": 1, "list": 4}


@dataclass(frozen=True)
class Example:
    """K images; numbers of 40 digits."""

    policy: list[mpf]
    reference: list[mpf]
    labels: list[mpf]
    scores: list[mpf]
    baseline: mpf


Formula = Callable[[Example, Example], mpf]
"""The loss of an example. The second argument is the same example, for the places that no gradient passes."""


@dataclass(frozen=True)
class Case:
    """An objective, its equation, and what has to be true of it."""

    name: str
    loss: Loss
    formula: Formula
    at_start: Callable[[Example], mpf]
    """The loss where policy and reference agree."""
    compares: bool = True
    """The loss stays the same when one number is added to the policy's errors of all images of an example."""
    anchored: bool = True
    """The loss stays the same when one number is added to policy's and reference's error of an image."""
    goal: Callable[[Example], mpf | float] = lambda e: INFINITY
    """The margin up to which the chosen image's error is pulled down and the rejected one's pushed up."""


def sigmoid(x: mpf) -> mpf:
    return 1 / (1 + exp(-x))


def gain(e: Example, i: int) -> mpf:
    return e.reference[i] - e.policy[i]


def margin(e: Example) -> mpf:
    """u, the one quantity of all pairwise objectives."""
    return mpf(BETA) / 2 * (gain(e, 0) - gain(e, 1))


def of_margin(link: Callable[[mpf], mpf]) -> Formula:
    """A function of u, averaged over both readings of an uncertain label."""
    return lambda e, held: e.labels[0] * link(margin(e)) + e.labels[1] * link(-margin(e))


def of_both_orders(formula: Formula) -> Formula:
    """The same, for what is not a function of u: the second reading has the images swapped."""

    def averaged(e: Example, held: Example) -> mpf:
        return e.labels[0] * formula(e, held) + e.labels[1] * formula(swapped(e), swapped(held))

    return averaged


def swapped(e: Example) -> Example:
    turned = {name: getattr(e, name)[::-1] for name in ("policy", "reference", "labels", "scores")}
    return replace(e, **turned)


# --- the equations ---


def dmpo(smoothing: str) -> Formula:
    a = mpf(float(smoothing))

    def divergence(u: mpf) -> mpf:
        yes, no = sigmoid(u), sigmoid(-u)
        return yes * log(yes / (1 - a)) + no * log(no / a)

    return of_margin(divergence)


def dpo_shift(e: Example, held: Example) -> mpf:
    return log(1 + exp(-mpf(BETA) / 2 * (gain(e, 0) - mpf(0.75) * gain(e, 1))))


def linear_dpo(lowest: float, highest: float) -> Formula:
    def formula(e: Example, held: Example) -> mpf:
        h = gain(held, 0) - gain(held, 1)
        return min(max(mpf(1) / 2 - BETA * h / 5, mpf(lowest)), mpf(highest)) * (e.policy[0] - e.policy[1])

    return of_both_orders(formula)


def phi(x: mpf) -> mpf:
    return x / (exp(x) - 1) if x else mpf(1)


def mapo(scale: mpf, temperature: mpf, weight: mpf) -> Formula:
    def formula(e: Example, held: Example) -> mpf:
        logit = temperature * (phi(scale * e.policy[0]) - phi(scale * e.policy[1]))
        return e.policy[0] - weight * log(sigmoid(logit))

    return of_both_orders(formula)


def kto(desirable: float, undesirable: float) -> Formula:
    def formula(e: Example, held: Example) -> mpf:
        value = mpf(BETA) / 2 * (gain(e, 0) - max(e.baseline, mpf(0)))
        liked, disliked = desirable * (1 - sigmoid(value)), undesirable * (1 - sigmoid(-value))
        return e.labels[0] * liked + (1 - e.labels[0]) * disliked

    return formula


def rank_dpo(e: Example, held: Example) -> mpf:
    images = range(len(e.policy))
    order = sorted(images, key=lambda i: -gain(held, i))
    rank = {image: place + 1 for place, image in enumerate(order)}
    total = mpf(0)
    for i in images:
        for j in images:
            if e.scores[i] > e.scores[j]:
                gains = abs(2 ** e.scores[i] - 2 ** e.scores[j])
                discounts = abs(log(2) / log(1 + rank[i]) - log(2) / log(1 + rank[j]))
                total += gains * discounts * log(1 + exp(-mpf(BETA) / 2 * (gain(e, i) - gain(e, j))))
    return total


def plackett_luce(e: Example, held: Example) -> mpf:
    strengths = [exp(mpf(BETA) / 2 * gain(e, i)) for i in range(len(e.policy))]
    total = mpf(0)
    for k, strength in enumerate(strengths):
        total -= log(strength / sum(strengths[k:]))
    return total


LN2 = log(2)
SMOOTH, FLIP = mpf(0.125), mpf(0.125)
CASES = [
    Case("dpo", DPO(beta=BETA), of_margin(lambda u: -log(sigmoid(u))), lambda e: LN2),
    Case(
        "conservative_dpo",
        DPO(beta=BETA, label_smoothing=0.125),
        of_margin(lambda u: -(1 - SMOOTH) * log(sigmoid(u)) - SMOOTH * log(sigmoid(-u))),
        lambda e: LN2,
        goal=lambda e: log(7),
    ),
    Case(
        "robust_dpo",
        RobustDPO(beta=BETA, flip_rate=0.125),
        of_margin(lambda u: (-(1 - FLIP) * log(sigmoid(u)) + FLIP * log(sigmoid(-u))) / (1 - 2 * FLIP)),
        lambda e: LN2,
    ),
    # published as (h - 1 / (2 tau))^2 with tau = beta / 2, here times tau^2
    Case(
        "ipo",
        IPO(beta=BETA),
        of_margin(lambda u: (2 * u / BETA - mpf(1) / BETA) ** 2 * (mpf(BETA) / 2) ** 2),
        lambda e: mpf(1) / 4,
        goal=lambda e: 0.5,
    ),
    Case("hinge", Hinge(beta=BETA), of_margin(lambda u: max(mpf(0), 1 - u)), lambda e: mpf(1), goal=lambda e: 1.0),
    Case(
        "dmpo",
        DMPO(beta=BETA, smoothing=0.125),
        dmpo("0.125"),
        lambda e: log(mpf(1) / 2 / (1 - SMOOTH)) / 2 + log(mpf(1) / 2 / SMOOTH) / 2,
        goal=lambda e: log(7),
    ),
    Case(
        "dpo_shift",
        DPOShift(beta=BETA, rejected_weight=0.75),
        of_both_orders(dpo_shift),
        lambda e: LN2,
        compares=False,
    ),
    Case(
        "linear_dpo",
        LinearDPO(beta=BETA, eta=0.125, maximum=0.875),
        linear_dpo(0.125, 0.875),
        lambda e: (e.policy[0] - e.policy[1]) / 2,
        anchored=False,
    ),
    Case(
        "mapo",
        MaPO(),
        mapo(mpf(1) / 2, mpf(1000), mpf(0.1)),
        lambda e: e.policy[0] - mpf(0.1) * log(sigmoid(1000 * (phi(e.policy[0] / 2) - phi(e.policy[1] / 2)))),
        compares=False,
        anchored=False,
    ),
    Case(
        "mapo_aaai",
        MaPO(beta=8),
        mapo(mpf(1), mpf(8), mpf(1) / 8),
        lambda e: e.policy[0] - log(sigmoid(8 * (phi(e.policy[0]) - phi(e.policy[1])))) / 8,
        compares=False,
        anchored=False,
    ),
    Case("kto", KTO(beta=BETA), kto(1, 1), lambda e: mpf(1) / 2, compares=False),
    Case(
        "weighted_kto",
        KTO(beta=BETA, desirable_weight=1.5, undesirable_weight=0.25),
        kto(1.5, 0.25),
        lambda e: mpf(3) / 4 if e.labels[0] == 1 else mpf(1) / 8,
        compares=False,
    ),
    Case("sft", SFT(), lambda e, held: e.policy[0], lambda e: e.policy[0], compares=False, anchored=False),
    Case(
        "dco",
        DCO(beta=BETA),
        lambda e, held: -log(sigmoid(mpf(BETA) / 2 * gain(e, 0))),
        lambda e: LN2,
        compares=False,
    ),
    Case(
        "capo",
        CaPO(beta=BETA),
        lambda e, held: (e.scores[0] - e.scores[1] - margin(e)) ** 2,
        lambda e: (e.scores[0] - e.scores[1]) ** 2,
        goal=lambda e: e.scores[0] - e.scores[1],
    ),
    # the weights at the start: ranks 1 to 4, in the order of the list
    Case(
        "rank_dpo",
        RankDPO(beta=BETA),
        rank_dpo,
        lambda e: sum(
            LN2 * (2 ** e.scores[i] - 2 ** e.scores[j]) * (log(2) / log(2 + i) - log(2) / log(2 + j))
            for i in range(4)
            for j in range(i + 1, 4)
        ),
    ),
    Case("plackett_luce", PlackettLuce(beta=BETA), plackett_luce, lambda e: log(24)),
]
PAIRWISE = [case for case in CASES if case.loss.unit == "pair"]


# --- float data, and the way there and back ---


def make_errors(
    num_images: int = 2,
    batch: int = 6,
    *,
    seed: int = 0,
    soft: bool = False,
    dtype: torch.dtype = torch.float64,
    choices: tuple[float, ...] = (),
) -> ImageErrors:
    """Random errors below 0.03, or taken from `choices`; scores fall along the list, as they do in rankings."""
    generator = torch.Generator().manual_seed(seed)
    shape = (2, batch, num_images)
    values = torch.rand(shape, generator=generator, dtype=torch.float64) * 0.03
    if choices:
        values = torch.tensor(choices, dtype=torch.float64)[torch.randint(len(choices), shape, generator=generator)]
    policy, reference = values.to(dtype)
    first = torch.rand(batch, generator=generator, dtype=dtype) / 2 + 0.5
    if not soft:
        first = torch.ones(batch, dtype=dtype) if num_images > 1 else (torch.arange(batch) % 2 == 0).to(dtype)
    labels = torch.full((batch, num_images), 0.5, dtype=dtype)
    labels[:, -1] = 1 - first
    labels[:, 0] = first
    log_snr = torch.linspace(-5, 7, batch, dtype=dtype)
    return ImageErrors(
        policy=policy.clone().requires_grad_(),
        reference=reference.clone().requires_grad_(),
        drift=torch.rand((batch, num_images), generator=generator, dtype=dtype),
        cross=torch.randn(batch, generator=generator, dtype=dtype),
        timesteps=torch.arange(batch),
        log_snr=log_snr,
        previous_log_snr=log_snr + 0.01,
        labels=labels,
        scores=torch.rand((batch, num_images), generator=generator, dtype=dtype).sort(1, descending=True).values,
        baseline=2.0**-8,
    )


def for_case(case: Case, **settings: object) -> ImageErrors:
    """`make_errors` with as many images as the objective looks at."""
    return make_errors(NUM_IMAGES[case.loss.unit], **settings)  # type: ignore[arg-type]


def to_examples(errors: ImageErrors) -> list[Example]:
    """The rows of a batch, every float taken exactly."""
    tensors = (errors.policy, errors.reference, errors.labels, errors.scores)
    rows = zip(*([[mpf(x) for x in row] for row in tensor.tolist()] for tensor in tensors), strict=True)  # type: ignore[union-attr]
    return [Example(*row, mpf(errors.baseline)) for row in rows]


def derivatives(formula: Formula, e: Example, of: str) -> list[mpf]:
    """The derivative of the formula with respect to each entry of `policy` or `reference`, to some 20 digits."""

    def moved(i: int, x: mpf) -> Example:
        entries = list(getattr(e, of))
        entries[i] = x
        return replace(e, **{of: entries})

    return [
        mp.diff(lambda x, i=i: formula(moved(i, x), e), entry)  # type: ignore[misc]
        for i, entry in enumerate(getattr(e, of))
    ]
