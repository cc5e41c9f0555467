"""Train the pocket models from nothing: a Stable Diffusion (VAE, then UNet with its text encoder) and a CLIP.

    python scripts/train_pocket.py --work-dir runs/pocket          # every stage, then export into the package
    python scripts/train_pocket.py --work-dir runs/pocket --stage unet

Seeded and resumable: every batch is a function of (seed, stage, step), and each stage saves its weights and optimizer
every few hundred steps, so that the same command carries on where the last one stopped. On two CPU cores the whole
thing takes about two hours (docs/pocket.md has the measured times).
"""

import argparse
import json
import math
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline
from pocket_parts import (
    also_true,
    build_scheduler,
    build_text_encoder,
    build_tokenizer,
    build_unet,
    build_vae,
    clip_config,
    corrupt,
    draw,
    hash_seed,
    soften,
    to_tensor,
    tokenize,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from diffusion_dpo.pocket.world import Scene, fill_sizes, render, sample_scene

SAVE_EVERY_STEPS = 200
CAPTION_NOISE = 0.15
"""Share of training captions with one word changed. Captions of the web are wrong as often; it is what leaves the base
drawing clean images that are not always what was asked for, i.e. something for preference tuning to mend."""


# --- the stages ------------------------------------------------------------------------------------------------------


def train_vae(work: Path, seed: int, steps: int) -> None:
    """AutoencoderKL, f = 8, 4 channels: L1 + L2 + KL on fresh renderings."""
    torch.manual_seed(seed)
    vae = build_vae()

    def loss_of(step: int) -> torch.Tensor:
        _, images = draw(seed, "vae", step, batch_size=16)
        posterior = vae.encode(images).latent_dist
        generator = torch.Generator().manual_seed(hash_seed(seed, "vae-noise", step))
        difference = vae.decode(posterior.sample(generator)).sample - images
        return difference.square().mean() + 0.5 * difference.abs().mean() + 1e-5 * posterior.kl().mean() / 256

    run_stage(work, "vae", {"vae": vae}, loss_of, steps=steps, learning_rate=2e-3)


def train_unet(work: Path, seed: int, steps: int) -> None:
    """UNet and text encoder together: epsilon error on VAE latents, 10 % of the captions empty."""
    torch.manual_seed(seed + 1)
    vae, tokenizer = build_vae(), build_tokenizer()
    load_stage(work, "vae", {"vae": vae})
    vae.requires_grad_(False).eval().to(memory_format=torch.channels_last)
    scaling_factor = latent_scale(vae, seed)
    unet, text_encoder = build_unet(), build_text_encoder(tokenizer)
    scheduler = build_scheduler()

    def loss_of(step: int) -> torch.Tensor:
        captions, images = draw(seed, "unet", step, batch_size=64, caption_noise=CAPTION_NOISE)
        generator = torch.Generator().manual_seed(hash_seed(seed, "unet-noise", step))
        dropped = torch.rand(len(captions), generator=generator) < 0.1
        captions = ["" if drop else text for text, drop in zip(captions, dropped.tolist(), strict=True)]
        with torch.no_grad():
            latents = vae.encode(images).latent_dist.sample(generator) * scaling_factor
        noise = torch.randn(latents.shape, generator=generator)
        timesteps = torch.randint(1000, (len(captions),), generator=generator)
        text = text_encoder(tokenize(tokenizer, captions)).last_hidden_state
        prediction = unet(scheduler.add_noise(latents, noise, timesteps), timesteps, text).sample
        return F.mse_loss(prediction, noise)

    modules = {"unet": unet, "text_encoder": text_encoder}
    run_stage(work, "unet", modules, loss_of, steps=steps, learning_rate=1e-3)


def train_clip(work: Path, seed: int, steps: int) -> None:
    """CLIP (open_clip's own class) on groups of near-twin scenes, so that one wrong word is enough to tell apart."""
    from open_clip.model import CLIP

    torch.manual_seed(seed + 2)
    tokenizer = build_tokenizer()
    model = CLIP(**clip_config(tokenizer))
    group, groups = 8, 16

    def loss_of(step: int) -> torch.Tensor:
        rng = np.random.default_rng(hash_seed(seed, "clip", step))
        scenes: list[Scene] = []
        for _ in range(groups):
            twins = [sample_scene(rng)]
            twins += [corrupt(twins[0], rng) for _ in range(group - 1)]
            scenes += twins
        drawn = [fill_sizes(scene, rng) for scene in scenes]
        images = to_tensor([soften(render(scene, rng), rng) for scene in drawn])
        out = model(images, tokenize(tokenizer, [scene.caption for scene in scenes]))
        image_features, text_features, scale = out
        logits = scale * image_features @ text_features.T
        logits = logits.masked_fill(also_true(drawn, scenes, group), -1e4)
        labels = torch.arange(len(scenes))
        return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2

    run_stage(work, "clip", {"clip": model}, loss_of, steps=steps, learning_rate=1e-3)


def export(work: Path, seed: int, target: Path) -> None:
    """Write the diffusers pipeline and the open_clip folder, both in fp16 safetensors."""
    vae, unet, tokenizer = build_vae(), build_unet(), build_tokenizer()
    text_encoder = build_text_encoder(tokenizer)
    load_stage(work, "vae", {"vae": vae})
    load_stage(work, "unet", {"unet": unet, "text_encoder": text_encoder})
    vae.register_to_config(scaling_factor=latent_scale(vae, seed))
    scheduler = DDIMScheduler.from_config(
        build_scheduler().config, clip_sample=False, set_alpha_to_one=False, steps_offset=1
    )
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    shutil.rmtree(target, ignore_errors=True)
    pipeline.to(torch.float16).save_pretrained(target / "stable-diffusion")
    text_config = target / "stable-diffusion" / "text_encoder" / "config.json"
    settings = json.loads(text_config.read_text()) | {
        "dtype": "float32"
    }  # or transformers loads what it finds: float16
    text_config.write_text(json.dumps(settings, indent=2) + "\n")
    clip_dir = target / "clip"
    tokenizer.save_pretrained(clip_dir)
    state = load_file(stage_file(work, "clip"))
    weights = {k.removeprefix("ema.clip."): v.half() for k, v in state.items() if k.startswith("ema.clip.")}
    save_file(weights, clip_dir / "open_clip_model.safetensors")
    preprocess = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "resize_mode": "shortest"}
    config = {"model_cfg": clip_config(tokenizer), "preprocess_cfg": preprocess}
    (clip_dir / "open_clip_config.json").write_text(json.dumps(config, indent=2) + "\n")
    size = sum(path.stat().st_size for path in target.rglob("*.safetensors"))
    print(f"wrote {target} ({size / 1e6:.2f} MB of weights)")


# --- the loop --------------------------------------------------------------------------------------------------------


def run_stage(
    work: Path,
    name: str,
    modules: dict[str, torch.nn.Module],
    loss_of: Callable[[int], torch.Tensor],
    *,
    steps: int,
    learning_rate: float,
    ema_decay: float = 0.998,
) -> None:
    """AdamW with warm-up and cosine decay to zero, and an average of the weights; resumes from the last save."""
    weights = {f"{m}.{k}": v for m, module in modules.items() for k, v in module.state_dict().items()}
    trained = [p for module in modules.values() for p in module.parameters()]
    for module in modules.values():
        module.train().to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(trained, lr=learning_rate, weight_decay=0.01, betas=(0.9, 0.99), fused=True)
    ema = {k: v.clone() for k, v in weights.items()}
    start, seconds = restore(work, name, modules, ema, optimizer, trained)
    began, recent = time.time(), []
    for step in range(start, steps):
        ramp = min(1.0, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * step / steps))
        for param_group in optimizer.param_groups:
            param_group["lr"] = learning_rate * ramp
        loss = loss_of(step)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        decay = min(ema_decay, (step + 1) / (step + 10))
        with torch.no_grad():
            for module_name, module in modules.items():
                for key, value in module.state_dict().items():
                    average = ema[f"{module_name}.{key}"]
                    average.lerp_(value, 1 - decay) if value.is_floating_point() else average.copy_(value)
        recent.append(loss.item())
        if (step + 1) % SAVE_EVERY_STEPS == 0 or step + 1 == steps:
            spent = time.time() - began
            left = spent / (step + 1 - start) * (steps - step - 1) / 60
            passed = f"{seconds + spent:.0f} s, {left:.0f} min left"
            print(f"{name} step {step + 1}/{steps} loss {np.mean(recent):.4f}, {passed}", flush=True)
            recent = []
            save(work, name, modules, ema, optimizer, trained, step + 1, seconds + spent)


def stage_file(work: Path, name: str) -> Path:
    return work / f"{name}.safetensors"


def save(work, name, modules, ema, optimizer, trained, step, seconds) -> None:
    state = {f"now.{m}.{k}": v.contiguous() for m, module in modules.items() for k, v in module.state_dict().items()}
    state |= {f"ema.{k}": v.contiguous() for k, v in ema.items()}
    for i, parameter in enumerate(trained):
        state |= {f"adam.{i}.{k}": v.contiguous() for k, v in optimizer.state[parameter].items()}
    partial = stage_file(work, name).with_suffix(".partial")
    save_file(state, partial, metadata={"step": str(step), "seconds": str(seconds)})
    os.replace(partial, stage_file(work, name))


def restore(work, name, modules, ema, optimizer, trained) -> tuple[int, float]:
    """Load the last save, if any; return its step and the seconds spent so far."""
    path = stage_file(work, name)
    if not path.exists():
        return 0, 0.0
    state = load_file(path)
    for module_name, module in modules.items():
        prefix = f"now.{module_name}."
        module.load_state_dict({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})
    for key in ema:
        ema[key].copy_(state[f"ema.{key}"])
    for i, parameter in enumerate(trained):
        keys = ("step", "exp_avg", "exp_avg_sq")
        optimizer.state[parameter] = {k: state[f"adam.{i}.{k}"].clone() for k in keys}
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    print(f"{name}: resuming at step {metadata['step']}", flush=True)
    return int(metadata["step"]), float(metadata["seconds"])


def load_stage(work: Path, name: str, modules: dict[str, torch.nn.Module]) -> None:
    """Load the averaged weights of a finished (or unfinished) stage."""
    state = load_file(stage_file(work, name))
    for module_name, module in modules.items():
        prefix = f"ema.{module_name}."
        module.load_state_dict({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})


@torch.no_grad()
def latent_scale(vae: AutoencoderKL, seed: int) -> float:
    """1 / standard deviation of the latents of 512 scenes, the usual `scaling_factor`."""
    _, images = draw(seed, "scale", 0, batch_size=512)
    return round(1 / float(vae.encode(images).latent_dist.mode().std()), 4)


def main() -> None:
    stages = ("vae", "clip", "unet", "export")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work-dir", type=Path, default=Path("runs/pocket"))
    parser.add_argument("--stage", choices=stages, help="one stage only (default: all that are not finished)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, nargs=3, metavar=stages[:3], default=(7000, 1500, 5000))
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    package = Path(__file__).parents[1] / "diffusion_dpo" / "pocket" / "weights"
    parser.add_argument("--target", type=Path, default=package)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.work_dir.mkdir(parents=True, exist_ok=True)
    run = {"vae": train_vae, "clip": train_clip, "unet": train_unet}
    for name, steps in zip(stages[:3], args.steps, strict=True):
        if args.stage in (None, name):
            run[name](args.work_dir, args.seed, steps)
    if args.stage in (None, "export"):
        export(args.work_dir, args.seed, args.target)


if __name__ == "__main__":
    main()
