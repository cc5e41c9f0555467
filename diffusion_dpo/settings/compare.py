"""The settings of `compare`."""

import re
from pathlib import Path
from typing import Any, Self

from pydantic import Field, model_validator

from diffusion_dpo.config import Config, plugin
from diffusion_dpo.settings.common import Device, ImageModel, Precision, Sampling

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,39}")
_OF_THE_BASELINE = ("pretrained", "revision", "variant", "prediction_type")


class CompareConfig(Config):
    """Any number of models against a baseline, on the same prompts, seeds and noise -> report.html and report.json."""

    baseline: ImageModel = ImageModel()
    """The model that things are compared with, usually the base."""
    models: dict[str, ImageModel] = {"tuned": ImageModel(adapter_path=Path("runs/train"))}
    """The others, by names of your choice; the first one heads the report. One that names no `pretrained` has the
    baseline's."""
    adapter_scales: tuple[float, ...] = ()
    """Draw every model with a LoRA at each of these strengths, instead of at its own adapter_scale."""
    prompts_path: Path | None = None
    """Prompts, as for `generate`: a file, or parti, geneval, hpsv2 or pocket; null takes pocket, held-out
    prompts of its world."""
    num_prompts: int | None = Field(None, ge=1)
    """Use only the first so many prompts; null uses all (64 of the pocket world when there is no file)."""
    seeds_per_prompt: int = Field(2, ge=1)
    """Images per prompt and model."""
    sampling: Sampling = Sampling()
    """How all models draw."""
    scorers: list[plugin("scorers")] = ["clip"]  # type: ignore[valid-type]
    """The judges."""
    diversity: plugin("scorers") | None = "clip_diversity"  # type: ignore[valid-type]
    """The judge of how different the images of a prompt are from each other: clip_diversity, or diversity (LPIPS);
    null leaves it out."""
    distance: plugin("scorers") | None = "clip_image"  # type: ignore[valid-type]
    """The judge of how far a model's image is from the baseline's: clip_image, dino or lpips; null leaves it out."""
    trained_on: tuple[str, ...] | None = None
    """Metrics that labelled the training pairs; null reads them from the pairs that the adapters were trained on."""
    human: Path | None = None
    """A folder of `label` with people's votes on these images, whose win rates are shown beside the judges'."""
    seed: int = Field(0, ge=0, lt=2**63)
    """Base seed of the noise."""
    device: Device = "auto"
    """Where to compute; auto takes cuda, then mps, then cpu."""
    mixed_precision: Precision = "auto"
    """Number format of all models; auto is bf16 or fp16 on cuda, fp32 elsewhere."""
    embed_images: bool = True
    """One report.html with a selection of the images inside; false shows all, in `report_assets/` beside it."""
    output_dir: Path = Path("runs/compare")
    """Folder for the images and the reports; models, judges and seeds may be added there later."""

    @model_validator(mode="before")
    @classmethod
    def _models_on_the_baseline(cls, data: Any) -> Any:
        """Give the models that name no `pretrained` the baseline's."""
        if not isinstance(data, dict):
            return data
        given = data.get("models", {"tuned": {"adapter_path": "runs/train"}})
        if not isinstance(given, dict):
            return data
        baseline = data.get("baseline")
        if isinstance(baseline, ImageModel):
            baseline = baseline.model_dump()
        shared = {key: baseline[key] for key in _OF_THE_BASELINE if isinstance(baseline, dict) and key in baseline}
        models = {
            name: {**shared, **model} if isinstance(model, dict) and "pretrained" not in model else model
            for name, model in given.items()
        }
        return {**data, "models": models}

    @model_validator(mode="after")
    def _names_hold(self) -> Self:
        if not self.models:
            raise ValueError("models is empty; name at least one, e.g. models.tuned.adapter_path=runs/train")
        for name in self.models:
            if name == "baseline" or not _NAME.fullmatch(name):
                raise ValueError(
                    f"models: {name!r} cannot be a model's name; take up to 40 letters, digits, `.`, `_`, `@` or `-`, "
                    "and not `baseline`"
                )
        names = [name for model in self.models for name in self.names_of(model)]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ValueError(
                f"models and adapter_scales make two models of the name {twice!r}; rename one, or take "
                "strengths that differ more"
            )
        return self

    def names_of(self, model: str) -> list[str]:
        """Return what a model is called in the report: its name, or one for each of `adapter_scales`."""
        if self.models[model].adapter_path is None or not self.adapter_scales:
            return [model]
        return [f"{model}@{scale:g}" for scale in self.adapter_scales]
