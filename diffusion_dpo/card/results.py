"""The numbers of a comparison for a model card: those of the very weights that the card is of."""

from dataclasses import dataclass
from pathlib import Path

from diffusion_dpo.config import ConfigError
from diffusion_dpo.report import MetricResult, Report
from diffusion_dpo.sampling import adapter_hash


@dataclass(frozen=True)
class Results:
    """What a comparison says of one of its models."""

    report: Report
    model: str

    @property
    def metrics(self) -> list[MetricResult]:
        """The main metrics over all prompts; numbers that inform only stay out of a card."""
        return [result for result in self.report.of(self.model) if not result.auxiliary]


def read_results(path: Path, run: Path) -> Results:
    """Read report.json, or the folder that holds one: what it says of the adapter that a run folder holds now.

    Raises ConfigError when it is no such file, or when that adapter at strength 1 is not among its models.
    """
    file = path / "report.json" if path.is_dir() else path
    try:
        report = Report.model_validate_json(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(f"{file} is not the report.json of a comparison by this version: {reason}") from error
    adapter = adapter_hash(run)
    ours = [facts.name for facts in report.models if (facts.adapter, facts.adapter_scale) == (adapter, 1.0)]
    if not ours:
        raise ConfigError(
            f"{file} says nothing of what {run} holds now, at strength 1; compare it: models.tuned.adapter_path={run}"
        )
    return Results(report, ours[0])
