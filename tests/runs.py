"""Short training runs of tiny models, and what of them has to be equal bit for bit."""

import atexit
import functools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

from diffusion_dpo.config import load
from diffusion_dpo.sampling import image_seed
from diffusion_dpo.settings import TrainConfig


def make_config(model: Path, pairs: Path, output_dir: Path, *overrides: str) -> TrainConfig:
    common = [
        f"model.pretrained={model}",
        f"data.path={pairs}",
        f"output_dir={output_dir}",
        "max_steps=6",
        "global_batch_size=4",
        "per_device_batch_size=2",
        "checkpointing_steps=2",
        "learning_rate=1e-3",
        "model.lora.rank=2",
        "preview.sampling.num_inference_steps=2",
        "preview.prompts=[abc]",
    ]
    return load(TrainConfig, None, [*common, *overrides])


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def final_state(run_dir: Path) -> dict[str, Any]:
    """Everything that must be equal bit for bit: the last checkpoint, the saved weights and the metrics."""
    last = sorted((run_dir / "checkpoints").glob("step-*"))[-1]
    files = [*last.glob("*.safetensors"), *run_dir.glob("adapter/*.safetensors"), *run_dir.glob("unet/*.safetensors")]
    assert len(files) >= 3
    tensors = {
        f"{file.name} {name}": tensor.contiguous().numpy().tobytes()
        for file in files
        for name, tensor in load_file(file).items()
    }
    return {**tensors, "metrics": (run_dir / "metrics.jsonl").read_text()}


PLAIN = """
import json, os, sys
import diffusers, torch
for line in sys.stdin:
    run_dir, model, pipeline, guidance = json.loads(line)
    pipe = getattr(diffusers, pipeline).from_pretrained(model)
    if os.path.isdir(f"{run_dir}/adapter"):
        pipe.load_lora_weights(f"{run_dir}/adapter")
    else:
        pipe.unet = diffusers.UNet2DConditionModel.from_pretrained(f"{run_dir}/unet")
    noise = torch.load(f"{run_dir}/noise.pt", weights_only=True)
    image = pipe("abc", latents=noise, num_inference_steps=2, guidance_scale=guidance).images[0]
    assert not any(name.startswith("diffusion_dpo") for name in sys.modules)
    image.save(f"{run_dir}/plain.png")
    print("drawn", flush=True)
"""


@functools.cache
def plain_diffusers() -> subprocess.Popen[str]:
    """A process without this package, which imports diffusers once and draws with it line by line."""
    process = subprocess.Popen(
        [sys.executable, "-c", PLAIN], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd="/"
    )
    atexit.register(process.kill)
    return process


def draw_plainly(run_dir: Path, model: Path, pipeline: str, *, guidance: float) -> np.ndarray:
    """What plain diffusers draws for "abc" with the result of a run, in a process without this package, as pixels."""
    noise = torch.randn((4, 8, 8), generator=torch.Generator().manual_seed(image_seed(0, "abc", 0)))[None]
    torch.save(noise, run_dir / "noise.pt")
    assert (run_dir / "adapter").exists() != (run_dir / "unet").exists()
    process = plain_diffusers()
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(json.dumps([str(run_dir), str(model), pipeline, guidance]) + "\n")
    process.stdin.flush()
    assert process.stdout.readline() == "drawn\n"
    return read_image(run_dir / "plain.png")


def read_image(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path), dtype=int)


def assert_drawn_alike(run_dir: Path, model: Path, pipeline: str, *, guidance: float) -> None:
    """The saved result is the model that the last preview came from, and not the one of the first."""
    plain = draw_plainly(run_dir, model, pipeline, guidance=guidance)
    ours, base = (read_image(run_dir / "previews" / f"step-{step:08d}" / "00.png") for step in (6, 0))
    assert np.abs(plain - ours).max() <= 1
    assert np.abs(base - ours).max() > 3


MODES = {
    "lora": [],
    "full": ["model.lora=null"],
    "bf16": ["mixed_precision=bf16"],
    "checkpointing": ["gradient_checkpointing=true"],
}
