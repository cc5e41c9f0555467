"""`score`: candidates -> scores, by one judge after the other; what was judged once is not judged again."""

import math
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np

from diffusion_dpo.config import ConfigError, command
from diffusion_dpo.console import say
from diffusion_dpo.data.candidates import Unit
from diffusion_dpo.data.recognise import images_at
from diffusion_dpo.data.shards import read_columns
from diffusion_dpo.files import alone_in, claim, finish
from diffusion_dpo.scorers import Scorer
from diffusion_dpo.scorers.judge import check_metrics, warn_if_constant
from diffusion_dpo.scoring import Scoring, Verdicts
from diffusion_dpo.settings import ScoreConfig


def run(config: ScoreConfig) -> Path:
    """Judge the images that were not judged yet; return the folder of the scores."""
    check_metrics(config.scorers)
    units = images_at(config.path, config.prompt_column)
    beside = config.path if config.path.is_dir() else config.path.parent
    folder = config.output_dir or beside
    elsewhere = folder.resolve() != beside.resolve()
    num_images = sum(unit.num_images for unit in units)
    mains = [scorer.metrics[0].name for scorer in config.scorers]
    say(f"score: {num_images} images of {config.path} by {', '.join(mains)}")
    lines = [f"{'metric':<24}{'mean':>10}{'min':>10}{'max':>10}{'missing':>9}"]
    with claim(folder, "score", {}) if elsewhere else alone_in(folder):
        if elsewhere:
            _refuse_other_images(folder, units)
        for scorer in config.scorers:
            scoring = Scoring(
                scorer,
                config.path,
                folder,
                config.device,
                config.batch_size,
                timeout_seconds=config.batch_timeout_seconds,
                max_broken_share=config.max_broken_share,
            )
            lines += _summary(scorer, scoring.run(units))
        if elsewhere:
            finish(folder, "score", {}, num_images=num_images)
    following: dict[str, object] = {"path": config.path}
    if elsewhere:
        following["scores_dir"] = folder
    if config.prompt_column is not None:
        following["prompt_column"] = config.prompt_column
    if len(mains) > 1:
        following["metric"] = mains[0]
    say("\n".join([*lines, f"scores: {folder}", f"next: {command('pair', following)}"]))
    return folder


def _refuse_other_images(folder: Path, units: Sequence[Unit]) -> None:
    """Raise ConfigError where the scores of a folder are all of other images, whose place these would take."""
    scored: set[str] = set()
    for path in folder.glob("scores-*.parquet"):
        with suppress(ConfigError):  # a damaged one is made again
            scored.update(*read_columns(path, ["uid"]))
    if scored and not any(candidate.uid in scored for unit in units for candidate in unit.read(images=False)):
        raise ConfigError(f"{folder} holds scores of other images; choose another output_dir")


def _summary(scorer: Scorer, verdicts: Sequence[Verdicts]) -> list[str]:
    """One line a metric, and one for every reason why values are missing."""
    lines = []
    values = {m.name: np.array([found[m.name].value for found in verdicts]) for m in scorer.metrics}
    warn_if_constant(scorer.metrics, values)
    for name, array in values.items():
        there = array[np.isfinite(array)]
        numbers = [there.mean(), there.min(), there.max()] if len(there) else [math.nan] * 3
        lines.append(f"{name:<24}" + "".join(f"{x:>10.4f}" for x in numbers) + f"{len(array) - len(there):>9}")
    reasons = Counter(v.reason for found in verdicts for v in [found[scorer.metrics[0].name]] if math.isnan(v.value))
    return lines + [f"  {count} missing: {reason}" for reason, count in reasons.most_common()]
