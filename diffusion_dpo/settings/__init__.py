"""The settings of every verb, one class each. Defaults run offline, on the pocket model."""

from pathlib import Path

from pydantic import Field

from diffusion_dpo.config import Config, plugin
from diffusion_dpo.settings.common import Device as Device
from diffusion_dpo.settings.common import ImageModel as ImageModel
from diffusion_dpo.settings.common import Precision as Precision
from diffusion_dpo.settings.common import PredictionType as PredictionType
from diffusion_dpo.settings.common import Sampling as Sampling
from diffusion_dpo.settings.data import ExportConfig as ExportConfig
from diffusion_dpo.settings.data import GenerateConfig as GenerateConfig
from diffusion_dpo.settings.data import InspectConfig as InspectConfig
from diffusion_dpo.settings.data import PairConfig as PairConfig
from diffusion_dpo.settings.data import ScoreConfig as ScoreConfig
from diffusion_dpo.settings.data import Variant as Variant
from diffusion_dpo.settings.report import ReportConfig as ReportConfig
from diffusion_dpo.settings.training import Evaluation as Evaluation
from diffusion_dpo.settings.training import Preview as Preview
from diffusion_dpo.settings.training import Reference as Reference
from diffusion_dpo.settings.training import Regularizers as Regularizers
from diffusion_dpo.settings.training import TrainConfig as TrainConfig
from diffusion_dpo.settings.training import Weighting as Weighting


class CompareConfig(Config):
    """Two models on the same prompts, seeds and noise -> report.json and report.html."""

    before: ImageModel = ImageModel()
    """The model that things are compared with, usually the base."""
    after: ImageModel = ImageModel()
    """The tuned model: often the same `pretrained` with an `adapter_path`."""
    prompts_path: Path | None = None
    """Prompts, as for `generate`; null takes held-out prompts of the pocket world."""
    num_prompts: int | None = Field(None, ge=1)
    """Use only the first so many prompts; null uses all (64 of the pocket world when there is no file)."""
    seeds_per_prompt: int = Field(2, ge=1)
    """Images per prompt and model."""
    sampling: Sampling = Sampling()
    """How both models draw."""
    scorers: list[plugin("scorers")] = ["clip"]  # type: ignore[valid-type]
    """The judges."""
    trained_on: tuple[str, ...] | None = None
    """Metrics that labelled the training pairs; null reads them from the pairs that the adapter was trained on."""
    seed: int = Field(0, ge=0, lt=2**63)
    """Base seed of the noise."""
    device: Device = "auto"
    """Where to compute; auto takes cuda, then mps, then cpu."""
    mixed_precision: Precision = "auto"
    """Number format of both models; auto is bf16 or fp16 on cuda, fp32 elsewhere."""
    output_dir: Path = Path("runs/compare")
    """Folder for the images, report.json and report.html."""


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
    "train": TrainConfig,
    "report": ReportConfig,
    "compare": CompareConfig,
    "inspect": InspectConfig,
    "export": ExportConfig,
}
