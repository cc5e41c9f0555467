"""A tiny CLIP with random weights, in a folder as open_clip reads it."""

import json
from pathlib import Path

CONTEXT_LENGTH = 12


def make_clip(folder: Path) -> Path:
    """Write it and return the folder, for `model: local-dir:...`."""
    import torch
    from open_clip import CLIP
    from safetensors.torch import save_file

    num_tokens = save_tokenizer(folder)
    model = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8},
        "text_cfg": {
            "context_length": CONTEXT_LENGTH,
            "vocab_size": num_tokens,
            "hf_tokenizer_name": "local",
            "width": 32,
            "heads": 2,
            "layers": 1,
        },
    }
    torch.manual_seed(0)
    text = {key: value for key, value in model["text_cfg"].items() if key != "hf_tokenizer_name"}
    clip = CLIP(embed_dim=16, vision_cfg=model["vision_cfg"], text_cfg=text)
    save_file(clip.state_dict(), folder / "open_clip_model.safetensors")
    preprocess = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "resize_mode": "shortest"}
    config = {"model_cfg": model, "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    return folder


def save_tokenizer(folder: Path) -> int:
    """Write a tokenizer of single letters; return how many tokens it has, the last two of them start and end."""
    from transformers import CLIPTokenizer

    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    vocabulary = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    CLIPTokenizer(
        vocab={token: i for i, token in enumerate(vocabulary)}, merges=[], model_max_length=CONTEXT_LENGTH
    ).save_pretrained(folder)
    return len(vocabulary)
