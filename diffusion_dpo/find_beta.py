"""`train --find-beta`: short probes over beta and the learning rate, judged on held-out pairs, and a recommendation.

Every probe starts from the same weights and sees the same pairs with the same noise. The lowest held-out loss wins:
for DPO that is minus the log likelihood of the held-out labels under the implicit rewards, which suffers when those
are too timid as well as when they are too sure, and can be compared between betas.
"""

import itertools
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

from diffusion_dpo.config import ConfigError
from diffusion_dpo.console import progress, say, show, warn
from diffusion_dpo.data import PairSource, collect
from diffusion_dpo.data.recognise import settle
from diffusion_dpo.device import pick_device, pick_dtype
from diffusion_dpo.files import claim, finish, write_json
from diffusion_dpo.losses import Loss
from diffusion_dpo.models import DiffusionModel
from diffusion_dpo.settings import TrainConfig
from diffusion_dpo.train import train_step
from diffusion_dpo.training import Run
from diffusion_dpo.training.averaging import RunningAverage
from diffusion_dpo.training.health import Health
from diffusion_dpo.training.optimizers import make_optimizer, refuse_optimizer
from diffusion_dpo.training.setup import hold_out, make_scaler, prepare, refuse_contradictions

if TYPE_CHECKING:
    import torch
    from torch import Tensor

NUM_STEPS = 40
_BETA_FACTORS = (0.2, 1.0, 5.0)
_LEARNING_RATE_FACTORS = (0.3, 1.0, 3.0)
_MAX_CHOSEN_ERROR = 0.05
"""A probe that predicts the chosen images worse than this, relative to the reference, has broken the model."""


@dataclass(frozen=True)
class Probe:
    """One short training and what it did on held-out pairs; `metrics` is empty where it did not stay finite."""

    beta: float | None
    learning_rate: float
    metrics: dict[str, float]

    @property
    def is_sound(self) -> bool:
        """Whether the model is still one."""
        return bool(self.metrics) and self.metrics["eval/chosen_error"] < _MAX_CHOSEN_ERROR


def run(config: TrainConfig) -> Path:
    """Probe, print the table and the settings to take; return the folder with `probes.json`.

    Raises ConfigError when there are no held-out pairs to judge by.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("--find-beta runs in one process, and WORLD_SIZE is above 1; start it without a launcher")
    beside = config.output_dir if config.output_dir.name else config.output_dir.resolve()
    folder = beside.with_name(beside.name + "-find-beta")
    refuse_contradictions(config)
    config = settle(config)
    config = config.model_copy(update={"cache_dir": config.cache_dir or folder / "cache", "max_steps": NUM_STEPS})
    device = pick_device(config.device)
    refuse_optimizer(config, device)
    dtype = pick_dtype(config.mixed_precision, device)
    index_dir = (config.cache_dir or folder / "cache") / "index"
    data = collect.collect(
        cast(PairSource, config.data), max_broken_share=config.max_broken_share, index_dir=index_dir
    )
    if not len(hold_out(config, data)[1]):
        raise ConfigError(
            "no pairs are held out to judge the probes by: there are too few, or evaluation.share is 0, or the data "
            "are single images"
        )
    with claim(folder, "find-beta", {}):
        data.save(index_dir)
        model = cast(DiffusionModel, config.model).load(device=device, dtype=dtype, seed=config.seed)
        probes = list(_probe_all(prepare(config, model, data, dtype), dtype))
        rows = [{"beta": p.beta, "learning_rate": p.learning_rate, "metrics": p.metrics} for p in probes]
        write_json(folder / "probes.json", {"num_steps": NUM_STEPS, "probes": rows})
        finish(folder, "find-beta", {})
    best = recommend(probes)
    _print_table(probes, best)
    if best is None:
        warn(
            f"nothing to recommend: after {NUM_STEPS} steps no probe that left the model whole is more accurate on "
            "held-out pairs than a coin by two standard errors; hold out more pairs (evaluation.share), or start from "
            "another learning_rate"
        )
    else:
        beta = "" if best.beta is None else f"loss.beta={best.beta:g} "
        say(
            f"take: {beta}learning_rate={best.learning_rate:g}, and to reuse what is encoded: cache_dir="
            f"{config.cache_dir}\nall probes: {folder / 'probes.json'}"
        )
    return folder


def recommend(probes: Sequence[Probe]) -> Probe | None:
    """Return the sound probe with the lowest held-out loss, None when it is no more accurate than a coin.

    Objectives that are not about pairs have no such loss; there the most accurate one is taken. More accurate means by
    two standard errors.
    """
    sound = [probe for probe in probes if probe.is_sound]
    if not sound:
        return None
    best = min(sound, key=lambda probe: probe.metrics.get("eval/loss", -probe.metrics["eval/accuracy"]))
    chance = 0.5 + 2 * best.metrics.get("eval/accuracy/se", math.inf)
    return best if best.metrics["eval/accuracy"] > chance else None


def _probe_all(run: Run, dtype: "torch.dtype") -> Iterator[Probe]:
    start = {name: parameter.detach().clone() for name, parameter in run.parameters.items()}
    beta = run.config.loss.model_dump().get("beta")
    betas = [None] if beta is None else [beta * factor for factor in _BETA_FACTORS]
    rates = [run.config.learning_rate * factor for factor in _LEARNING_RATE_FACTORS]
    with progress("probes", len(betas) * len(rates) * NUM_STEPS, "steps") as advance:
        for beta, rate in itertools.product(betas, rates):
            probe = _begin(run, start, beta, rate, dtype)
            metrics: dict[str, float] = {}
            try:
                with closing(probe.reader.stream(0)) as batches:
                    for step in range(NUM_STEPS):
                        probe.health.watch(train_step(probe, step, batches))
                        advance()
                assert probe.held_out is not None
                with probe.as_result():
                    found = probe.held_out.evaluate(run.model)
                metrics = found if all(map(math.isfinite, found.values())) else {}
            except ConfigError as error:
                warn(f"beta {beta}, learning_rate {rate:g}: {error}")
            yield Probe(beta, rate, metrics)


def _begin(run: Run, start: "dict[str, Tensor]", beta: float | None, rate: float, dtype: "torch.dtype") -> Run:
    """Return a run with these settings, at its first step."""
    import torch

    with torch.no_grad():
        for name, parameter in run.parameters.items():
            parameter.copy_(start[name])
    loss = cast(Loss, run.config.loss.model_copy(update={} if beta is None else {"beta": beta}))
    config = run.config.model_copy(update={"loss": loss, "learning_rate": rate})
    objective = replace(run.objective, loss=loss)
    assert run.held_out is not None
    return replace(
        run,
        config=config,
        objective=objective,
        held_out=replace(run.held_out, objective=objective if run.held_out.objective else None),
        reader=replace(run.reader, config=config),
        optimizer=make_optimizer(config, run.parameters),
        scaler=make_scaler(run.model.device, dtype),
        averaged=run.averaged and RunningAverage(run.parameters, config.reference.ema_decay),
        ema=run.ema and RunningAverage(run.parameters, cast(float, config.ema_decay)),
        health=Health(),
    )


def _print_table(probes: Sequence[Probe], best: Probe | None) -> None:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for name in ("beta", "rate", "loss", "accuracy", "chosen", "rejected", "KL", ""):  # in 80 columns
        table.add_column(name, justify="right", no_wrap=True)
    for probe in probes:
        found = probe.metrics
        cells = ["diverged", "", "", "", ""]
        if found:
            cells = [
                f"{found['eval/loss']:.3f}" if "eval/loss" in found else "-",
                f"{found['eval/accuracy']:.2f} +- {found.get('eval/accuracy/se', math.nan):.2f}",
                f"{found['eval/chosen_error']:+.1%}",
                f"{found['eval/rejected_error']:+.1%}",
                f"{found['eval/kl']:.2g}",
            ]
        beta = "-" if probe.beta is None else f"{probe.beta:g}"
        table.add_row(beta, f"{probe.learning_rate:g}", *cells, "<- take" if probe is best else "")
    show(table)
