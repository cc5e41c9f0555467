"""What can be seen of models and judges before hours are spent: files that are missing, broken or of another kind."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusion_dpo.comparing.judging import all_scorers
from diffusion_dpo.config import ConfigError
from diffusion_dpo.models.adapters import INTERFACE, find_adapter
from diffusion_dpo.models.base import read_base
from diffusion_dpo.models.safetensors_file import read_facts
from diffusion_dpo.settings import CompareConfig, ImageModel
from diffusion_dpo.training.state import is_checkpoint, settings_of

_TEXT_LAYER = re.compile(r".*attn2[._]to_[kv][._].*(?:down|lora_A).*")


def refuse_unopenable(config: CompareConfig) -> None:
    """Raise ConfigError where a model, its adapter or a judge's weights are missing, broken or of another family.

    Of weights only the headers are read.
    """
    named = {f"models.{name}": model for name, model in config.models.items()}
    for name, model in {"baseline": config.baseline, **named}.items():
        try:
            _look_at(model)
        except ConfigError as error:
            path = model.adapter_path
            lost = path is not None and not path.exists()
            hint = "; train one, or name yours: models.tuned.adapter_path=FOLDER" if lost else ""
            raise ConfigError(f"{name}: {error}{hint}") from None
    for scorer in (*all_scorers(config), *([] if config.distance is None else [config.distance])):
        scorer.fingerprint()  # which finds the weights, and says where to get those that are not there


def _look_at(model: ImageModel) -> None:
    path = model.adapter_path
    if path is not None and is_checkpoint(path):
        settings_of(path)
        path = None  # it is loaded as a whole before anything is drawn
    found = None if path is None else find_adapter(path)
    base = read_base(model.pretrained, revision=model.revision, variant=model.variant)
    if found is None:
        return
    kind, where = found
    if kind == "unet":
        _refuse_other_unet(where, base.unet, model.pretrained)
        return
    width = base.unet["cross_attention_dim"]
    for name, shape in read_facts(where).shapes.items():
        if _TEXT_LAYER.fullmatch(name) and len(shape) == 2 and shape[1] != width:
            raise ConfigError(
                f"the LoRA {where} does not fit {model.pretrained}: it takes text embeddings of width {shape[1]}, not "
                f"{width}; was it trained on another family?"
            )


def _refuse_other_unet(folder: Path, base: Mapping[str, Any], pretrained: str) -> None:
    file = folder / "config.json"
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
        other = next((key for key in INTERFACE if key in settings and settings[key] != base[key]), None)
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"{file} cannot be read: {error}") from error
    if other is not None:
        raise ConfigError(
            f"the UNet {folder} does not fit {pretrained}: its {other} is {settings[other]}, not {base[other]}; was "
            "it trained on another family?"
        )
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise ConfigError(f"{folder} holds no weights of a UNet (*.safetensors)")
    for part in weights:
        read_facts(part)
