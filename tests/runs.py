"""Short training runs of tiny models, and what of them has to be equal bit for bit."""

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from diffusion_dpo.config import load
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


MODES = {
    "lora": [],
    "full": ["model.lora=null"],
    "bf16": ["mixed_precision=bf16"],
    "checkpointing": ["gradient_checkpointing=true"],
}
