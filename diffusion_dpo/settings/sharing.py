"""The settings of what leaves the house: `export`, its --check, and `push`."""

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from diffusion_dpo.config import Config, Plugin, plugin
from diffusion_dpo.settings.common import Device, PredictionType

PAIR_FORMATS = ("pickapic", "webdataset")
LORA_FORMATS = ("diffusers", "kohya")
_OF_PAIRS = ("data", "soft_labels", "seed", "shard_size", "max_broken_share")
_OF_MODELS = (
    "adapter_path",
    "adapter_scale",
    "pretrained",
    "revision",
    "variant",
    "prediction_type",
    "dtype",
    "device",
)


class ExportConfig(Config):
    """Preference pairs, or a tuned model -> files that other programs read; --check FILE looks at yours."""

    format: Literal["pickapic", "webdataset", "diffusers", "kohya", "merged", "single_file"] = "pickapic"
    """Of pairs: pickapic, Parquet with the columns of Pick-a-Pic, the winner on a random side, which the Diffusion-DPO
    scripts of diffusers and Salesforce read; webdataset, tar files, a pair as chosen and rejected image and a .json.
    Of a tuned model: diffusers, a LoRA as diffusers loads it; kohya, a LoRA as ComfyUI, A1111, Forge and InvokeAI
    do; merged, the whole pipeline with the adapter in its weights; single_file, that as one checkpoint in the layout
    of the original Stable Diffusion."""
    data: plugin("data") = "auto"  # type: ignore[valid-type]
    """Of pairs: which."""
    soft_labels: bool = False
    """pickapic: write label probabilities as label_0 and label_1, which most trainers refuse or skip; false writes
    1 and 0 whatever the probability."""
    seed: int = Field(0, ge=0, lt=2**63)
    """pickapic: decides, with the pair's id, which of its images is image 0."""
    shard_size: int = Field(256, ge=1)
    """Pairs per file; a crash loses at most one file."""
    max_broken_share: float = Field(0.05, ge=0, le=1)
    """Of pairs: stop when more than this share of the rows is broken."""
    adapter_path: Path | None = None
    """Of a model: a run folder of `train`, a LoRA folder or file, or a `unet/` folder."""
    adapter_scale: float = 1.0
    """Strength of the LoRA that becomes 1 in what is written; 1 keeps what was trained."""
    pretrained: str | None = None
    """The pipeline that the adapter was trained on; null reads it from the run folder."""
    revision: str | None = None
    """Branch, tag or commit of `pretrained` on the hub; null reads it from the run folder."""
    variant: str | None = None
    """Variant of the weight files of `pretrained`, e.g. fp16; null reads it from the run folder."""
    prediction_type: PredictionType | None = None
    """What `pretrained` predicts, where its files do not say it or say it wrongly; null takes what they say, or, with
    `pretrained` left out, what the run folder says."""
    dtype: Literal["fp16", "fp32"] = "fp16"
    """Number format of the weights in the files. fp16 is what most programs compute in."""
    device: Device = "auto"
    """Where the model is run to verify what was written; auto takes cuda, then mps, then cpu."""
    output_dir: Path = Path("runs/export")
    """Folder for the files; the same command again continues there, or finds them finished."""

    @model_validator(mode="after")
    def _only_what_counts(self) -> Self:
        of_pairs = self.format in PAIR_FORMATS
        for name in _OF_MODELS if of_pairs else _OF_PAIRS:
            if _differs(self, name):
                raise ValueError(f"format={self.format} takes no {name}; leave it out, or choose another format")
        if self.format == "webdataset" and self.soft_labels:
            raise ValueError("format=webdataset keeps every label as it is; leave soft_labels out")
        if not of_pairs and self.adapter_path is None:
            raise ValueError(f"format={self.format} needs adapter_path: a run folder of `train`, or a LoRA")
        return self


class CheckConfig(Config):
    """What a file is, whether it fits a model, and whether it changes what the model draws."""

    path: Path
    """A LoRA file or folder, a single-file checkpoint, a `unet/` folder, a run folder, or a diffusers pipeline."""
    pretrained: str | None = None
    """The base model; null reads it from the run folder that the file lies in, if it does."""
    revision: str | None = None
    """Branch, tag or commit of `pretrained` on the hub."""
    variant: str | None = None
    """Variant of the weight files of `pretrained`, e.g. fp16."""
    prediction_type: PredictionType | None = None
    """What `pretrained` predicts, where its files do not say it or say it wrongly; null takes what they say."""
    device: Device = "auto"
    """Where to compute; auto takes cuda, then mps, then cpu."""


class PushConfig(Config):
    """The result of a training run -> the Hugging Face hub: weights, card, settings; says first what it would send."""

    path: Path = Path("runs/train")
    """The run folder of `train`."""
    repo_id: str | None = None
    """Where to: owner/name. Without it nothing can be sent, only listed."""
    dry_run: bool = True
    """List what would be sent and send nothing; false sends it."""
    private: bool = True
    """Make a new repository private. One that is there already stays as it is."""
    kohya_path: Path | None = None
    """A LoRA in kohya's names to send along, as `export format=kohya` writes it; null looks in the run's `kohya/`."""
    report_path: Path | None = None
    """The folder of a comparison: its numbers go into the card, its report.md and plots beside it."""
    endpoint: str | None = None
    """Address of the hub; null is huggingface.co, or HF_ENDPOINT."""


def _differs(config: Config, name: str) -> bool:
    """Whether a setting is another than its default."""
    value: Any = getattr(config, name)
    default = type(config).model_fields[name].get_default()
    if isinstance(value, Plugin):
        return value.type != default or value != type(value)(type=default)
    return bool(value != default)
