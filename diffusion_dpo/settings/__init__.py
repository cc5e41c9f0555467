"""The settings of every verb, one class each. Defaults run offline, on the pocket model."""

from pathlib import Path

from pydantic import Field

from diffusion_dpo.config import Config
from diffusion_dpo.settings.common import Device as Device
from diffusion_dpo.settings.common import ImageModel as ImageModel
from diffusion_dpo.settings.common import Precision as Precision
from diffusion_dpo.settings.common import PredictionType as PredictionType
from diffusion_dpo.settings.common import Sampling as Sampling
from diffusion_dpo.settings.compare import CompareConfig as CompareConfig
from diffusion_dpo.settings.data import GenerateConfig as GenerateConfig
from diffusion_dpo.settings.data import InspectConfig as InspectConfig
from diffusion_dpo.settings.data import PairConfig as PairConfig
from diffusion_dpo.settings.data import ScoreConfig as ScoreConfig
from diffusion_dpo.settings.data import Variant as Variant
from diffusion_dpo.settings.label import LabelConfig as LabelConfig
from diffusion_dpo.settings.report import ReportConfig as ReportConfig
from diffusion_dpo.settings.sharing import CheckConfig as CheckConfig
from diffusion_dpo.settings.sharing import ExportConfig as ExportConfig
from diffusion_dpo.settings.sharing import PushConfig as PushConfig
from diffusion_dpo.settings.training import Evaluation as Evaluation
from diffusion_dpo.settings.training import Preview as Preview
from diffusion_dpo.settings.training import Reference as Reference
from diffusion_dpo.settings.training import Regularizers as Regularizers
from diffusion_dpo.settings.training import TrainConfig as TrainConfig
from diffusion_dpo.settings.training import Weighting as Weighting


class DemoConfig(Config):
    """Every verb, one after the other, on the pocket model."""

    output_dir: Path = Path("runs/demo")
    """Folder for everything that the demo makes."""
    seed: int = Field(0, ge=0, lt=2**63)
    """Base seed of the prompts, the images and the training."""


VERBS: dict[str, type[Config]] = {
    "generate": GenerateConfig,
    "score": ScoreConfig,
    "pair": PairConfig,
    "label": LabelConfig,
    "train": TrainConfig,
    "report": ReportConfig,
    "compare": CompareConfig,
    "inspect": InspectConfig,
    "export": ExportConfig,
    "push": PushConfig,
}
