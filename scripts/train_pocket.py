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
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image, ImageFilter
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from diffusion_dpo.pocket.world import (
    COLORS,
    IMAGE_SIZE_PX,
    RELATIONS,
    SHAPES,
    SIZES,
    Scene,
    fill_sizes,
    render,
    sample_scene,
)

SAVE_EVERY_STEPS = 200
CONTEXT_LENGTH = 24
CAPTION_NOISE = 0.25
"""Share of training captions with one word changed. Captions of the web are wrong as often; it is what leaves the base
drawing clean images that are not always what was asked for, i.e. something for preference tuning to mend."""
CLIP_CONFIG = {
    "embed_dim": 64,
    "vision_cfg": {"image_size": IMAGE_SIZE_PX, "layers": 4, "width": 96, "head_width": 24, "patch_size": 8},
    "text_cfg": {
        "context_length": CONTEXT_LENGTH,
        "vocab_size": 0,  # filled in from the tokenizer
        "hf_tokenizer_name": "local",  # open_clip's local-dir: then reads the tokenizer beside this file
        "width": 64,
        "heads": 4,
        "layers": 3,
    },
}


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
    vae, tokenizer = build_vae(), build_tokenizer(work)
    load_stage(work, "vae", {"vae": vae})
    vae.requires_grad_(False).eval()
    scaling_factor = latent_scale(work, vae, seed)
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
    tokenizer = build_tokenizer(work)
    model = CLIP(**clip_config(tokenizer))
    group, groups = 8, 32

    def loss_of(step: int) -> torch.Tensor:
        rng = np.random.default_rng(hash_seed(seed, "clip", step))
        scenes: list[Scene] = []
        for _ in range(groups):
            twins = [sample_scene(rng)]
            twins += [corrupt(twins[0], rng) for _ in range(group - 1)]
            scenes += twins
        drawn = [fill_sizes(scene, rng) for scene in scenes]
        images = to_tensor([soften(render(scene, rng), rng) for scene in drawn]) * 1.0
        out = model(images, tokenize(tokenizer, [scene.caption for scene in scenes]))
        image_features, text_features, scale = out
        logits = scale * image_features @ text_features.T
        logits = logits.masked_fill(also_true(drawn, scenes, group), -1e4)
        labels = torch.arange(len(scenes))
        return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2

    run_stage(work, "clip", {"clip": model}, loss_of, steps=steps, learning_rate=1e-3)


def export(work: Path, seed: int, target: Path) -> None:
    """Write the diffusers pipeline and the open_clip folder, both in fp16 safetensors."""
    vae, unet, tokenizer = build_vae(), build_unet(), build_tokenizer(work)
    text_encoder = build_text_encoder(tokenizer)
    load_stage(work, "vae", {"vae": vae})
    load_stage(work, "unet", {"unet": unet, "text_encoder": text_encoder})
    vae.register_to_config(scaling_factor=latent_scale(work, vae, seed))
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
    clip_dir = target / "clip"
    tokenizer.save_pretrained(clip_dir)
    model = {"clip": torch.nn.Identity()}
    state = load_file(stage_file(work, "clip"))
    weights = {k.removeprefix("ema.clip."): v.half() for k, v in state.items() if k.startswith("ema.clip.")}
    save_file(weights, clip_dir / "open_clip_model.safetensors")
    preprocess = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "resize_mode": "shortest"}
    config = {"model_cfg": clip_config(tokenizer), "preprocess_cfg": preprocess}
    (clip_dir / "open_clip_config.json").write_text(json.dumps(config, indent=2) + "\n")
    del model
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
    from safetensors import safe_open

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


# --- data ------------------------------------------------------------------------------------------------------------


def hash_seed(*parts: object) -> int:
    import hashlib

    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:7], "big")


def draw(seed: int, stage: str, step: int, *, batch_size: int, caption_noise: float = 0.0):
    """Draw a batch: captions, and images as float [-1, 1] of shape (B, 3, 64, 64), channels last."""
    rng = np.random.default_rng(hash_seed(seed, stage, step))
    scenes = [sample_scene(rng) for _ in range(batch_size)]
    images = to_tensor([render(scene, rng) for scene in scenes])
    captions = [(corrupt(s, rng) if rng.random() < caption_noise else s).caption for s in scenes]
    return captions, images


def to_tensor(images: list[Image.Image]) -> torch.Tensor:
    pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images]))
    return pixels.permute(0, 3, 1, 2).float() / 127.5 - 1


def soften(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Blur and noise of random strength, so that the judge is not surprised by what a VAE decodes."""
    if rng.random() < 0.5:
        image = image.filter(ImageFilter.GaussianBlur(float(rng.uniform(0, 1.2))))
    pixels = np.asarray(image, np.float32) + rng.normal(0, rng.uniform(0, 8), (IMAGE_SIZE_PX, IMAGE_SIZE_PX, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def corrupt(scene: Scene, rng: np.random.Generator) -> Scene:
    """Change one word of a scene's caption, or swap a property between its two items."""
    from dataclasses import replace

    while True:
        items, background, relation = list(scene.items), scene.background, scene.relation
        k = int(rng.integers(len(items)))
        kind = rng.choice(["color", "shape", "size", "background", "relation", "swap"])
        if kind == "background":
            background = str(rng.choice(list(COLORS)))
        elif kind == "relation" and relation:
            relation = str(rng.choice(RELATIONS))
        elif kind == "swap" and relation:
            field = str(rng.choice(["color", "shape", "size"]))
            values = [getattr(item, field) for item in items]
            items = [replace(item, **{field: value}) for item, value in zip(items, values[::-1], strict=True)]
        elif kind in ("color", "shape", "size"):
            choices = {"color": list(COLORS), "shape": list(SHAPES), "size": list(SIZES)}[str(kind)]
            if kind != "size" or items[k].size:
                items[k] = replace(items[k], **{str(kind): str(rng.choice(choices))})
        changed = Scene(tuple(items), background, relation)
        if changed != scene and all(item.color != background for item in items):
            return changed


def also_true(drawn: list[Scene], captions: list[Scene], group: int) -> torch.Tensor:
    """Mask (images, captions) of captions that hold for another scene's image too (twins may differ by nothing)."""
    from diffusion_dpo.pocket.world import _OPPOSITE

    def holds(caption: Scene, scene: Scene) -> bool:
        if caption.background != scene.background or len(caption.items) != len(scene.items):
            return False
        orders = [(scene.items, scene.relation)]
        if scene.relation:
            orders.append((scene.items[::-1], _OPPOSITE[scene.relation]))
        return any(
            caption.relation == relation
            and all(
                (c.color, c.shape) == (s.color, s.shape) and c.size in (None, s.size)
                for c, s in zip(caption.items, items, strict=True)
            )
            for items, relation in orders
        )

    mask = torch.zeros(len(drawn), len(captions), dtype=torch.bool)
    for start in range(0, len(drawn), group):
        for i in range(start, start + group):
            for j in range(start, start + group):
                mask[i, j] = i != j and holds(captions[j], drawn[i])
    return mask


# --- the parts -------------------------------------------------------------------------------------------------------


def build_vae() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 16, 32, 64),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        norm_num_groups=2,  # more, over 8 channels, normalise away the colour of the background
        latent_channels=4,
        sample_size=IMAGE_SIZE_PX,
    )


def build_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=IMAGE_SIZE_PX // 8,
        block_out_channels=(64, 128),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=64,
        attention_head_dim=4,
        norm_num_groups=16,
    )


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=CONTEXT_LENGTH,
        projection_dim=64,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)


def build_scheduler() -> DDPMScheduler:
    return DDPMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, prediction_type="epsilon", clip_sample=False
    )


def build_tokenizer(work: Path) -> CLIPTokenizer:
    """A CLIPTokenizer whose byte-pair merges spell out the words of the grammar; other words fall into letters."""
    words = {word for text in (*COLORS, *SHAPES, *SIZES, *RELATIONS, "a on background") for word in text.split()}
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)] + list("0123456789.,!?'-")
    vocabulary = letters + [f"{letter}</w>" for letter in letters]
    merges = []
    for word in sorted(words):
        left = word[0]
        for i, letter in enumerate(word[1:], start=1):
            right = letter + ("</w>" if i == len(word) - 1 else "")
            if left + right not in vocabulary:
                merges.append((left, right))
                vocabulary.append(left + right)
            left += right
    vocabulary += ["<|startoftext|>", "<|endoftext|>"]  # the end must have the highest id: CLIP pools at its argmax
    return CLIPTokenizer(
        vocab={token: i for i, token in enumerate(vocabulary)}, merges=merges, model_max_length=CONTEXT_LENGTH
    )


def clip_config(tokenizer: CLIPTokenizer) -> dict:
    return CLIP_CONFIG | {"text_cfg": CLIP_CONFIG["text_cfg"] | {"vocab_size": len(tokenizer)}}


def tokenize(tokenizer: CLIPTokenizer, captions: list[str]) -> torch.Tensor:
    return tokenizer(
        captions, padding="max_length", truncation=True, max_length=CONTEXT_LENGTH, return_tensors="pt"
    ).input_ids


@torch.no_grad()
def latent_scale(work: Path, vae: AutoencoderKL, seed: int) -> float:
    """1 / standard deviation of the latents of 512 scenes, the usual `scaling_factor`."""
    _, images = draw(seed, "scale", 0, batch_size=512)
    return round(1 / float(vae.encode(images).latent_dist.mode().std()), 4)


def main() -> None:
    stages = ("vae", "clip", "unet", "export")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work-dir", type=Path, default=Path("runs/pocket"))
    parser.add_argument("--stage", choices=stages, help="one stage only (default: all that are not finished)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, nargs=3, metavar=stages[:3], default=(9000, 1600, 8000))
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
