"""Which metrics of a comparison are held out: those of judges that had no part in labelling the training pairs."""

from collections.abc import Sequence

from diffusion_dpo.comparing import Compared
from diffusion_dpo.comparing.judging import all_scorers
from diffusion_dpo.config import ConfigError
from diffusion_dpo.report import Role
from diffusion_dpo.scorers import Scorer
from diffusion_dpo.scorers.judge import check_metrics
from diffusion_dpo.scorers.lineage import lineage_of_metrics
from diffusion_dpo.settings import CompareConfig


def refuse_unknown(config: CompareConfig) -> None:
    """Raise ConfigError where two judges give one metric, or `trained_on` names one that no judge gives."""
    check_metrics(config.scorers)
    known = {metric.name for scorer in all_scorers(config) for metric in scorer.metrics}
    for name in config.trained_on or ():
        if name not in known:
            raise ConfigError(
                f"trained_on names {name!r}, which no scorer here gives; they give {', '.join(sorted(known))}"
            )


def roles_of(config: CompareConfig, lineup: Sequence[Compared]) -> dict[str, dict[str, Role]]:
    """Return the role of every metric for every model: trained_on if it, or another one of its scorer, labelled.

    It is related where its judge shares a backbone or data with one that labelled, or data with the training pairs.
    """
    scorers = all_scorers(config)
    known: dict[tuple[frozenset[str], frozenset[str]], dict[str, Role]] = {}
    roles = {}
    for compared in lineup[1:]:
        key = frozenset(compared.labelled_by or ()), compared.lineage
        if key not in known:
            known[key] = _roles(scorers, *key)
        roles[compared.name] = known[key]
    return roles


def _roles(scorers: Sequence[Scorer], labelled: frozenset[str], lineage: frozenset[str]) -> dict[str, Role]:
    families = [{metric.name for metric in scorer.metrics} for scorer in scorers]
    lineage = lineage.union(
        lineage_of_metrics(labelled),
        *(scorer.lineage for scorer, family in zip(scorers, families, strict=True) if family & labelled),
    )
    roles: dict[str, Role] = {}
    for scorer, family in zip(scorers, families, strict=True):
        role: Role = "trained_on" if family & labelled else "related" if scorer.lineage & lineage else "held_out"
        roles |= dict.fromkeys(family, role)
    return roles
