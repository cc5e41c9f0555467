"""Which judges are related: a backbone or training data in common makes them err together."""

from collections.abc import Iterable
from typing import cast

from diffusion_dpo import registry
from diffusion_dpo.scorers import Scorer


def lineage_of_metrics(names: Iterable[str]) -> frozenset[str]:
    """Return the lineage of the registered judges that give these metrics with their defaults.

    A training run remembers names of metrics only. A name that no default gives says nothing.
    """
    wanted = set(names)
    found: set[str] = set()
    for name in registry.TABLES["scorers"] if wanted else ():
        cls = cast(type[Scorer], registry.resolve("scorers", name))
        if any(field.is_required() for field in cls.model_fields.values()):  # a judge behind an address, say
            continue
        scorer = cls.model_validate({"type": name})
        if wanted & {metric.name for metric in scorer.metrics}:
            found |= scorer.lineage
    return frozenset(found)
