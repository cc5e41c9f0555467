"""Tune text-to-image diffusion models on preferences: generate, score, pair, train with Diffusion-DPO, compare.

Everything here is imported on first use, so that `import diffusion_dpo` costs nothing. Each verb is a module with one
function: `diffusion_dpo.train.run(TrainConfig(...))`.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffusion_dpo.config import Config as Config
    from diffusion_dpo.config import ConfigError as ConfigError
    from diffusion_dpo.config import load as load
    from diffusion_dpo.data import Dropped as Dropped
    from diffusion_dpo.data import PairSource as PairSource
    from diffusion_dpo.data import PreferencePair as PreferencePair
    from diffusion_dpo.losses import ImageErrors as ImageErrors
    from diffusion_dpo.losses import ImageLoss as ImageLoss
    from diffusion_dpo.losses import ListLoss as ListLoss
    from diffusion_dpo.losses import Loss as Loss
    from diffusion_dpo.losses import PairErrors as PairErrors
    from diffusion_dpo.losses import PairLoss as PairLoss
    from diffusion_dpo.models import DiffusionModel as DiffusionModel
    from diffusion_dpo.models import LoadedModel as LoadedModel
    from diffusion_dpo.report.statistics import paired_statistics as paired_statistics
    from diffusion_dpo.scorers import Metric as Metric
    from diffusion_dpo.scorers import Scorer as Scorer
    from diffusion_dpo.scorers import ScoreRequest as ScoreRequest
    from diffusion_dpo.scorers import Scores as Scores
    from diffusion_dpo.settings import CompareConfig as CompareConfig
    from diffusion_dpo.settings import GenerateConfig as GenerateConfig
    from diffusion_dpo.settings import InspectConfig as InspectConfig
    from diffusion_dpo.settings import PairConfig as PairConfig
    from diffusion_dpo.settings import ScoreConfig as ScoreConfig
    from diffusion_dpo.settings import TrainConfig as TrainConfig
    from diffusion_dpo.strategies import Pick as Pick
    from diffusion_dpo.strategies import ScoreTable as ScoreTable
    from diffusion_dpo.strategies import Strategy as Strategy

__version__ = "0.1.0"

_NAMES = {
    "config": ("Config", "ConfigError", "load"),
    "data": ("Dropped", "PairSource", "PreferencePair"),
    "losses": ("ImageErrors", "ImageLoss", "ListLoss", "Loss", "PairErrors", "PairLoss"),
    "models": ("DiffusionModel", "LoadedModel"),
    "report.statistics": ("paired_statistics",),
    "scorers": ("Metric", "ScoreRequest", "Scorer", "Scores"),
    "settings": ("CompareConfig", "GenerateConfig", "InspectConfig", "PairConfig", "ScoreConfig", "TrainConfig"),
    "strategies": ("Pick", "ScoreTable", "Strategy"),
}
_HOMES = {name: module for module, names in _NAMES.items() for name in names}

__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*_HOMES, "__version__"])
