"""Where an adapter lies and which model it belongs to; a run folder of `train` says so itself."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from diffusion_dpo.config import ConfigError
from diffusion_dpo.models.adapters import AdapterKind, find_adapter
from diffusion_dpo.models.pipeline import load_base
from diffusion_dpo.settings import CheckConfig, ExportConfig
from diffusion_dpo.yaml_dialect import Loader

if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline


@dataclass(frozen=True)
class Base:
    """The pipeline that an adapter was trained on."""

    pretrained: str
    revision: str | None = None
    variant: str | None = None
    prediction_type: str | None = None

    def load(self, device: "torch.device") -> "DiffusionPipeline":
        """Load it in float32, as `load_base` does."""
        import torch

        return load_base(
            self.pretrained,
            revision=self.revision,
            variant=self.variant,
            prediction_type=self.prediction_type,
            device=device,
            dtype=torch.float32,
        )


def run_folder(path: Path) -> Path | None:
    """Return the run folder of `train` that a path is or lies in, at most two levels up."""
    for folder in (path, path.parent, path.parent.parent):
        if (folder / "config.yaml").is_file() and (folder / "metrics.jsonl").exists():
            return folder
    return None


def find_base(path: Path, config: ExportConfig | CheckConfig) -> Base | None:
    """Return the model to put an adapter on: the one that is named, else the one of its run folder, if it has any."""
    if config.pretrained is not None:
        return Base(config.pretrained, config.revision, config.variant, config.prediction_type)
    folder = run_folder(path)
    if folder is None:
        return None
    file = folder / "config.yaml"
    try:
        model = yaml.load(file.read_text(encoding="utf-8"), Loader)["model"]  # noqa: S506 - a SafeLoader
        asked = (getattr(config, name) or model.get(name) for name in ("revision", "variant", "prediction_type"))
        return Base(str(model["pretrained"]), *asked)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, yaml.YAMLError) as error:
        raise ConfigError(f"{file} does not say which model it was trained on; give pretrained=...") from error


def find_source(path: Path, base: Base | None) -> tuple[AdapterKind, Path, Base]:
    """Return an adapter's kind, its file or folder, and its base; raises ConfigError where one of them is unknown."""
    kind, where = find_adapter(path)
    if base is None:
        raise ConfigError(
            f"{path} does not say which model it was trained on; give pretrained=..., a folder or a hub id"
        )
    return kind, where, base


def name_of(path: Path) -> str:
    """Return what to call an export: the run's name, else that of the file or folder."""
    folder = run_folder(path) or path
    stem = folder.resolve().stem if folder.suffix == ".safetensors" else folder.resolve().name
    return "".join(letter if letter.isalnum() or letter in "-_." else "-" for letter in stem).strip(".-") or "adapter"
