"""Small labellings: candidates of coloured noise, and studies of them."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from diffusion_dpo.config import load
from diffusion_dpo.data.images import pixel_hash
from diffusion_dpo.data.shards import CANDIDATES, encode_png, image_struct, write_shard
from diffusion_dpo.settings import LabelConfig

TOKEN = "a-token-of-the-tests"


def write_candidates(folder: Path, prompts: Sequence[str], *, per_prompt: int = 2, side_px: int = 32) -> Path:
    """Candidates whose brightness rises with their number, and says what a rater should prefer."""
    rng = np.random.default_rng(0)
    rows = []
    for prompt in prompts:
        for index in range(per_prompt):
            light = 40 + 170 * index // max(1, per_prompt - 1)
            pixels = np.clip(light + rng.normal(0, 12, (side_px, side_px, 3)), 0, 255).astype(np.uint8)
            image = Image.fromarray(pixels)
            rows.append(
                {
                    "uid": pixel_hash(image),
                    "prompt_id": prompt,
                    "prompt": prompt,
                    "index": index,
                    "seed": index,
                    "image": image_struct(encode_png(image)),
                    "references": [],
                    "origin": "",
                    "settings_hash": "test",
                }
            )
    folder.mkdir(parents=True)
    write_shard(folder / "images-00000.parquet", rows, CANDIDATES)
    return folder


def make_config(root: Path, *overrides: str, prompts: Sequence[str] = (), per_prompt: int = 2) -> LabelConfig:
    if not (root / "candidates").exists():
        write_candidates(root / "candidates", prompts or [f"prompt {i}" for i in range(12)], per_prompt=per_prompt)
    common = [f"path={root / 'candidates'}", f"output_dir={root / 'label'}", f"token={TOKEN}", "repeat_share=0"]
    return load(LabelConfig, None, [*common, *overrides])
