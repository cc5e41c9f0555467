"""The judges of a comparison: every image once, whoever drew it; equal images have equal scores.

Beside the judges that are asked for, every comparison looks at what a model changes when it learns to please its
judge: light and colour, how much the images of a prompt differ, and how far they moved from the baseline's.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import cast

import numpy as np

from diffusion_dpo import registry
from diffusion_dpo.comparing import Wall
from diffusion_dpo.config import ConfigError
from diffusion_dpo.data.candidates import Candidate, Unit
from diffusion_dpo.data.prompts import Prompt
from diffusion_dpo.data.scores import Verdict
from diffusion_dpo.processes import Processes
from diffusion_dpo.report import BASELINE, MetricScores, Role
from diffusion_dpo.report.signs import APPEARANCE
from diffusion_dpo.scorers import Scorer
from diffusion_dpo.scoring import Scoring
from diffusion_dpo.settings import CompareConfig

_JUDGED_AT_ONCE = 64


@dataclass(frozen=True)
class Distances:
    """How far each model's images are from the baseline's, of shape (num_prompts, seeds); 0 is the same image."""

    name: str
    """The metric that says so."""
    models: dict[str, np.ndarray]
    yardstick: np.ndarray | None
    """The same between two seeds of the baseline, (num_prompts, seeds - 1); None where there is one seed."""


@dataclass(frozen=True)
class _Beside(Unit):
    """Images with others, in the same order, as their references."""

    reference: Unit | None = None

    def read(self, *, images: bool = True) -> Iterator[Candidate]:
        assert self.reference is not None
        for ours, theirs in zip(super().read(images=images), self.reference.read(), strict=True):
            yield replace(ours, references=(theirs.data,))


@dataclass(frozen=True)
class _Task:
    """One judge before some images, all of them or those of one model."""

    scorer: Scorer
    units: list[Unit]
    folder: Path
    """Where the scores go."""
    whose: str = ""
    """The one model whose images they are."""


def all_scorers(config: CompareConfig) -> list[Scorer]:
    """Return the judges whose metrics are reported, those included that every comparison has."""
    return [*_before_all(config), *([config.diversity] if config.diversity is not None else [])]


def _before_all(config: CompareConfig) -> list[Scorer]:
    given = {scorer.type for scorer in config.scorers}
    return [*config.scorers, *(_make(name) for name in APPEARANCE if name not in given)]


def refuse_unusable(config: CompareConfig, prompts: Sequence[Prompt]) -> None:
    """Say before anything is drawn what would stop the judges afterwards."""
    lacking = sum(not prompt.references for prompt in prompts)
    for scorer in config.scorers:
        if "rivals" in scorer.needs:
            raise ConfigError(
                f"the scorer {scorer.type} compares the images of a prompt with each other, which says nothing of two "
                f"models; give it as diversity={scorer.type}"
            )
        if lacking and "reference" in scorer.needs:
            raise ConfigError(
                f"the scorer {scorer.type} compares with reference images, and {lacking} of {len(prompts)} prompts "
                "have none; give prompts_path a .jsonl with `references`, or leave this scorer out"
            )
    for setting, scorer, need in (
        ("diversity", config.diversity, "rivals"),
        ("distance", config.distance, "reference"),
    ):
        if scorer is not None and need not in scorer.needs:
            kind = "compares the images of a prompt" if need == "rivals" else "compares an image with another one"
            raise ConfigError(f"{setting}={scorer.type}: a judge is needed that {kind}")


def judge_shares(config: CompareConfig, wall: Wall, processes: Processes) -> None:
    """Judge what was not judged yet, a part in each of several processes; `judge` finds it all afterwards."""
    apart = [*_diversity(config, wall).values()]
    tasks = _judges(config, wall)
    if config.distance is not None:
        tasks.append(_distance(config, _beside_baseline(wall)))
    for task in tasks:
        if mine := list(processes.share(task.units)):
            _run(config, replace(task, units=mine))
    for task in processes.share(apart):  # what is compared with all others is not divided
        _run(config, task)
    processes.wait()


def judge(
    config: CompareConfig, wall: Wall, roles: dict[str, dict[str, Role]]
) -> tuple[list[MetricScores], Distances | None]:
    """Judge what was not judged yet; return every metric's values, and how far the models are from the baseline."""
    scores: list[MetricScores] = []
    for task in _judges(config, wall):
        found = _run(config, task)
        size = len(found) // len(wall.units)
        of_model = {name: found[i * size : (i + 1) * size] for i, name in enumerate(wall.units)}
        scores += _as_scores(task.scorer, wall, of_model, roles, auxiliary=task.scorer not in config.scorers)
    apart = {name: _run(config, task) for name, task in _diversity(config, wall).items()}
    if apart and config.diversity is not None:
        scores += _as_scores(config.diversity, wall, apart, roles, auxiliary=True)
    if config.distance is None:
        return scores, None
    metric = config.distance.metrics[0]
    beside = _beside_baseline(wall)
    verdicts = iter(_run(config, _distance(config, beside)))
    distances = {}
    for name, units in beside.items():
        raw = np.array([it[metric.name].value for it in islice(verdicts, sum(unit.num_images for unit in units))])
        distances[name] = (1 - raw if metric.higher_is_better else raw).reshape(-1, len(wall.prompts)).T
    return scores, Distances(metric.name, distances, distances.pop(BASELINE, None))


def _judges(config: CompareConfig, wall: Wall) -> list[_Task]:
    """Every judge before all images."""
    images = list(chain(*wall.units.values()))
    return [_Task(scorer, images, config.output_dir / "scores") for scorer in _before_all(config)]


def _diversity(config: CompareConfig, wall: Wall) -> dict[str, _Task]:
    """The judge of diversity before each model's images."""
    if config.diversity is None or wall.num_seeds == 1:
        return {}
    root = config.output_dir / "scores"
    return {name: _Task(config.diversity, units, root / name, name) for name, units in wall.units.items()}


def _beside_baseline(wall: Wall) -> dict[str, list[Unit]]:
    """Every model's images beside the baseline's, and the baseline's beside those of its first seed."""
    per_seed = len(wall.baseline) // wall.num_seeds
    beside = {name: _beside(units, wall.baseline, "moved") for name, units in wall.units.items() if name != BASELINE}
    if wall.num_seeds > 1:
        first = wall.baseline[:per_seed] * (wall.num_seeds - 1)
        beside[BASELINE] = _beside(wall.baseline[per_seed:], first, "seed")
    return beside


def _distance(config: CompareConfig, beside: dict[str, list[Unit]]) -> _Task:
    """The judge of distance before all of these."""
    assert config.distance is not None
    return _Task(config.distance, list(chain(*beside.values())), config.output_dir / "scores" / "distance")


def _run(config: CompareConfig, task: _Task) -> list[dict[str, Verdict]]:
    """Return the verdicts on all images of a task, in order."""
    task.folder.mkdir(parents=True, exist_ok=True)
    path = config.output_dir
    return Scoring(task.scorer, path, task.folder, config.device, _JUDGED_AT_ONCE, whose=task.whose).run(task.units)


def _beside(units: list[Unit], references: list[Unit], what: str) -> list[Unit]:
    return [
        _Beside(f"{what}-{unit.name}", unit.root, unit.files, unit.num_images, reference=reference)
        for unit, reference in zip(units, references, strict=True)
    ]


def _as_scores(
    scorer: Scorer,
    wall: Wall,
    of_model: dict[str, list[dict[str, Verdict]]],
    roles: dict[str, dict[str, Role]],
    *,
    auxiliary: bool,
) -> list[MetricScores]:
    return [
        MetricScores(
            name=metric.name,
            role="held_out",
            roles={name: of_metric[metric.name] for name, of_metric in roles.items()},
            higher_is_better=metric.higher_is_better,
            values={
                name: wall.arrange([found[metric.name].value for found in verdicts])
                for name, verdicts in of_model.items()
            },
            auxiliary=auxiliary or metric.auxiliary,
        )
        for metric in scorer.metrics
    ]


def _make(name: str) -> Scorer:
    """Return a registered scorer with its defaults."""
    return cast(Scorer, registry.resolve("scorers", name).model_validate({"type": name}))  # type: ignore[attr-defined]
