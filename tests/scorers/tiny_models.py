"""Tiny models with random weights, in the formats of transformers, open_clip, torchvision and LAION."""

import hashlib
import json
from pathlib import Path
from typing import Any

from tests.scorers.tiny_clip import CONTEXT_LENGTH, save_tokenizer

HPS_ARCHITECTURE = "tiny-hps"


def make_transformers_clip(folder: Path) -> Path:
    """A CLIPModel with preprocessing and tokenizer; embeddings of 16 numbers."""
    import torch
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

    num_tokens = save_tokenizer(folder)
    layer = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    ends = {"bos_token_id": num_tokens - 2, "eos_token_id": num_tokens - 1, "pad_token_id": num_tokens - 1}
    text = {**layer, **ends, "vocab_size": num_tokens, "max_position_embeddings": CONTEXT_LENGTH}
    vision = {**layer, "image_size": 32, "patch_size": 8}
    torch.manual_seed(0)
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def make_dino(folder: Path) -> Path:
    import torch
    from transformers import BitImageProcessor, Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    size = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    Dinov2Model(Dinov2Config(**size)).save_pretrained(folder)
    BitImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 28, "width": 28}).save_pretrained(folder)
    return folder


def make_head(file: Path, width: int = 16) -> Path:
    """A head of the aesthetic predictor for embeddings of `width` numbers."""
    import torch

    torch.manual_seed(0)
    sizes = {0: (width, 8), 2: (8, 6), 4: (6, 4), 6: (4, 2), 7: (2, 1)}
    state: dict[str, Any] = {}
    for number, (before, after) in sizes.items():
        layer = torch.nn.Linear(before, after)
        state |= {f"layers.{number}.weight": layer.weight.detach(), f"layers.{number}.bias": layer.bias.detach()}
    torch.save(state, file)
    return file


def make_hps(folder: Path) -> Path:
    """A checkpoint as HPS has it, and its architecture told to open_clip under the name HPS_ARCHITECTURE."""
    import open_clip
    import torch

    num_tokens = save_tokenizer(folder)
    text = {"context_length": CONTEXT_LENGTH, "vocab_size": num_tokens, "width": 32, "heads": 2, "layers": 1}
    vision = {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8}
    torch.manual_seed(0)
    clip = open_clip.CLIP(embed_dim=16, vision_cfg=vision, text_cfg=text)
    torch.save({"epoch": 1, "name": "tiny", "state_dict": clip.state_dict()}, folder / "HPS_v2.1_compressed.pt")
    named = {"embed_dim": 16, "vision_cfg": vision, "text_cfg": {**text, "hf_tokenizer_name": str(folder)}}
    config = folder / f"{HPS_ARCHITECTURE}.json"
    config.write_text(json.dumps(named))
    open_clip.add_model_config(config)
    return folder


def make_trunk(file: Path, net: str) -> dict[str, Any]:
    """A random trunk as torchvision saves it; returns the settings of a scorer by LPIPS with it."""
    import torch
    import torchvision

    torch.manual_seed(0)
    model = {"alex": torchvision.models.alexnet, "squeeze": torchvision.models.squeezenet1_1}[net](weights=None)
    torch.save({key: value for key, value in model.state_dict().items() if key.startswith("features")}, file)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    return {"net": net, "trunk_path": str(file), "trunk_sha256": digest}
