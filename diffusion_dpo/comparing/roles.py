"""Which metrics of a comparison are held out: those of judges that had no part in labelling the training pairs."""

from diffusion_dpo.comparing.lineup import trained_on_metrics
from diffusion_dpo.config import ConfigError
from diffusion_dpo.console import warn
from diffusion_dpo.report import Role
from diffusion_dpo.scorers.judge import check_metrics
from diffusion_dpo.scorers.lineage import lineage_of_metrics
from diffusion_dpo.settings import CompareConfig


def roles_of(config: CompareConfig) -> dict[str, Role]:
    """Return the role of every metric: trained_on if it, or another one of its scorer, labelled; else related or not.

    Raises ConfigError where `trained_on` names a metric that no scorer gives.
    """
    check_metrics(config.scorers)
    families = [{metric.name for metric in scorer.metrics} for scorer in config.scorers]
    known = sorted(set().union(*families))
    labelled_by = config.trained_on
    if labelled_by is not None:
        for name in labelled_by:
            if name not in known:
                raise ConfigError(
                    f"trained_on names {name!r}, which no scorer here gives; they give {', '.join(known)}"
                )
    else:
        adapters = [model.adapter_path for model in config.models.values() if model.adapter_path is not None]
        labelled_by = tuple(dict.fromkeys(name for path in adapters for name in trained_on_metrics(path)))
        if adapters and not labelled_by:
            warn("nothing says which metrics labelled the training pairs, so all are called held out; set trained_on")
    labelled = set(labelled_by)
    lineage = lineage_of_metrics(labelled).union(
        *(scorer.lineage for scorer, family in zip(config.scorers, families, strict=True) if family & labelled)
    )
    roles: dict[str, Role] = {}
    for scorer, family in zip(config.scorers, families, strict=True):
        role: Role = "trained_on" if family & labelled else "related" if scorer.lineage & lineage else "held_out"
        roles |= dict.fromkeys(family, role)
    return roles
