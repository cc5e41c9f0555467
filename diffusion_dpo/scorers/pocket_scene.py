"""Whether an image of the pocket world is what its caption says, checked fact by fact (`pocket/oracle.py`)."""

import hashlib
import inspect
from collections.abc import Sequence

import numpy as np

from diffusion_dpo.scorers import Metric, Need, Scorer, ScoreRequest, Scores


class PocketScene(Scorer):
    """Share of the caption's facts (count, background, relation, colours, shapes, sizes) that hold in the image."""

    licence = "none needed: a program without weights"
    source = "docs/pocket.md"

    @property
    def needs(self) -> frozenset[Need]:
        """The caption."""
        return frozenset({"prompt"})

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """`pocket_scene`, the share of the facts that hold, and `pocket_scene_all`, 1 where all do."""
        return (
            Metric("pocket_scene", higher_is_better=True, range=(0.0, 1.0)),
            Metric("pocket_scene_all", higher_is_better=True, range=(0.0, 1.0), auxiliary=True),
        )

    def fingerprint(self) -> str:
        """Hash the source of the oracle and of the world: there are no weights."""
        from diffusion_dpo.pocket import oracle, world

        source = inspect.getsource(oracle) + inspect.getsource(world)
        return "pocket_scene-1-" + hashlib.sha256(source.encode()).hexdigest()[:16]

    def score(self, batch: Sequence[ScoreRequest]) -> Scores:
        """Check each image against its caption; NaN for a prompt that is not of this world."""
        from diffusion_dpo.pocket import oracle, world

        share, everything = np.full(len(batch), np.nan), np.full(len(batch), np.nan)
        reasons = [""] * len(batch)
        for i, request in enumerate(batch):
            scene = world.parse_caption(request.prompt)
            if scene is None:
                reasons[i] = "the prompt is not a caption of the pocket world"
            else:
                share[i], everything[i] = oracle.check(request.image, scene)
        return Scores({"pocket_scene": share, "pocket_scene_all": everything}, tuple(reasons))
