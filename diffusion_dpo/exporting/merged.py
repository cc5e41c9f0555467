"""A whole pipeline as a folder that every diffusers loads with one plain line, with transformers 4 as with 5.

transformers 5 alone writes a text encoder under names that version 4 does not find (it goes on with random weights),
no vocabulary that version 4 reads, and a number format in which the text encoder, but not the UNet, is then loaded.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING

from diffusion_dpo.models.checkpoint_file import vocabulary
from diffusion_dpo.models.lora_write import text_path

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

_PLACES = ("_name_or_path",)
"""What settings say about where a model was loaded from: nobody's business."""


def write_merged(pipeline: "DiffusionPipeline", folder: Path) -> None:
    """Write a pipeline; its weights in their number format, the settings such that a plain load gives float32."""
    pipeline.save_pretrained(folder, safe_serialization=True)
    for file in folder.rglob("*.json"):
        settings = json.loads(file.read_text(encoding="utf-8"))
        if isinstance(settings, dict) and settings.keys() & {*_PLACES}:
            _write(file, {key: value for key, value in settings.items() if key not in _PLACES})
    for name in ("text_encoder", "text_encoder_2"):
        if name in pipeline.components:
            _rewrite_text_encoder(folder / name)
            _spell(pipeline.components[name.replace("text_encoder", "tokenizer")], folder, name)


def _rewrite_text_encoder(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    file = folder / "model.safetensors"
    weights = {text_path(key): value for key, value in load_file(file).items()}
    save_file(weights, file, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    _write(folder / "config.json", config | {"dtype": "float32"})


def _spell(tokenizer: object, folder: Path, name: str) -> None:
    vocab, merges = vocabulary(tokenizer)
    place = folder / name.replace("text_encoder", "tokenizer")
    _write(place / "vocab.json", vocab)
    (place / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")


def _write(file: Path, value: object) -> None:
    file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
