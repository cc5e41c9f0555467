"""`train`: preference pairs -> a tuned model, by Diffusion-DPO against a frozen reference.

Whatever stops a run, the same command finishes it as if nothing had happened: sample order, noise, timesteps and
dropout are functions of (seed, epoch, pair), so the state of a run is its weights, its optimizer and one step number.
"""

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

from diffusion_dpo import card, checkpoint, interrupt
from diffusion_dpo.config import ConfigError, dump
from diffusion_dpo.console import progress, say
from diffusion_dpo.data import PairSource, cache, collect
from diffusion_dpo.data.order import Visit, draw_randomness, global_batch
from diffusion_dpo.data.prompts import prompt_hash
from diffusion_dpo.device import pick_device, pick_dtype
from diffusion_dpo.errors import PairBatch, pair_errors
from diffusion_dpo.files import atomic_path, claim, finish
from diffusion_dpo.losses import Loss, PairErrors, PairLoss
from diffusion_dpo.models import DiffusionModel, LoadedModel
from diffusion_dpo.sampling import DrawRequest, draw, image_seed
from diffusion_dpo.settings import TrainConfig
from diffusion_dpo.tracking import Tracker

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from diffusion_dpo.data.cache import LatentCache
    from diffusion_dpo.data.collect import Collected

# What may change between two runs of one command without making it another run.
_NOT_IDENTITY = {
    "max_steps",
    "per_device_batch_size",
    "gradient_checkpointing",
    "device",
    "mixed_precision",  # the resolved dtype is recorded instead
    "checkpointing_steps",
    "checkpoints_total_limit",
    "preview",
    "max_broken_share",
    "cache_dir",
    "output_dir",
}
_STEP_ZERO_TOLERANCE = 1e-3
_MAX_PROMPT_HASHES = 100_000


@dataclass
class Run:
    """Everything that a training step needs."""

    config: TrainConfig
    model: LoadedModel
    loss: Loss
    pair_ids: list[str]
    prompts: list[str]
    label_probs: list[float]
    cache: "LatentCache"
    latent_shape: tuple[int, int, int]
    parameters: "dict[str, torch.nn.Parameter]"
    optimizer: "torch.optim.AdamW"
    scaler: "torch.amp.GradScaler"


def run(config: TrainConfig) -> Path:
    """Train, or continue, or find that nothing is left to do; return the folder of the adapter or full UNet."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("train runs in one process, and WORLD_SIZE is above 1; start it without a launcher")
    device = pick_device(config.device)
    dtype = pick_dtype(config.mixed_precision, device)
    source = cast(PairSource, config.data)
    model = cast(DiffusionModel, config.model).load(device=device, dtype=dtype, seed=config.seed)
    data = collect.collect(source, max_broken_share=config.max_broken_share)
    identity = {
        **config.model_dump(mode="json", exclude=_NOT_IDENTITY),
        "precision": str(dtype).removeprefix("torch."),
        "base_weights": model.base_hash,
        "encoders": model.encoder_hash,
        "data": {**config.data.model_dump(mode="json"), "content": data.fingerprint},
    }
    with claim(config.output_dir, "train", identity):
        _write_text(config.output_dir / "config.yaml", dump(config))
        card.write_environment(config.output_dir / "environment.json")
        state = prepare(config, model, data, dtype)
        trained_to = _train(state)
        adapter = card.save_model(model, config.output_dir)
        facts = {
            "steps": trained_to,
            "num_pairs": len(data),
            "drops": data.drops,
            "labelled_by": source.labelled_by(),
            "prompt_hashes": _prompt_hashes(state.prompts),
        }
        card.write_card(config, adapter, facts)
        finish(config.output_dir, "train", identity, **facts)
    say(f"trained: {adapter}\nlog: {config.output_dir / 'metrics.jsonl'}")
    say(f"next: {card.compare_command(config)}")
    return adapter


def prepare(config: TrainConfig, model: LoadedModel, data: "Collected", dtype: "torch.dtype") -> Run:
    """Encode what is not cached, and set up the optimizer: everything up to the first step."""
    import torch

    side = config.resolution_px or model.resolution_px
    if side % model.downscale:
        raise ConfigError(f"resolution_px is {side}; this model needs a multiple of {model.downscale}")
    latent_shape = (model.latent_channels, side // model.downscale, side // model.downscale)
    pair_ids, prompts = [record.pair_id for record in data.records], [record.prompt for record in data.records]
    latents = cache.build(
        config.cache_dir or config.output_dir / "cache",
        data,
        pair_ids,
        prompts,
        cache.Encoders(
            images=model.encode_images,
            prompts=model.encode_prompts,
            fingerprint=model.encoder_hash,
            latent_shape=latent_shape,
            resolution_px=side,
            dtype=torch.float32 if dtype == torch.float32 else torch.float16,
            batch_size=min(8, config.per_device_batch_size),
        ),
        random_flip=config.random_flip,
    )
    if config.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    parameters = model.trainable()
    optimizer = torch.optim.AdamW(
        parameters.values(),
        lr=config.learning_rate,
        betas=config.adam_betas,
        eps=config.adam_epsilon,
        weight_decay=config.weight_decay,
        fused=True,
    )
    scaler = torch.amp.GradScaler(model.device.type, enabled=dtype == torch.float16)
    say(
        f"train: {len(data)} pairs at {side} px, {sum(p.numel() for p in parameters.values()):,} trained "
        f"weights, {config.max_steps} steps of {config.global_batch_size} pairs "
        f"({config.gradient_accumulation_steps} x {config.per_device_batch_size}), "
        f"{config.max_steps * config.global_batch_size / len(data):.1f} epochs, on {model.device.type} in "
        f"{str(dtype).removeprefix('torch.')}"
    )
    return Run(
        config=config,
        model=model,
        loss=cast(Loss, config.loss),
        pair_ids=pair_ids,
        prompts=prompts,
        label_probs=[record.label_prob for record in data.records],
        cache=latents,
        latent_shape=latent_shape,
        parameters=parameters,
        optimizer=optimizer,
        scaler=scaler,
    )


def _train(run: Run) -> int:
    """Take the steps that are left, with previews and checkpoints; return the step that was reached."""
    config = run.config
    folder = config.output_dir / "checkpoints"
    first = _resume(run, folder)
    _preview_if_due(run, first)
    with (
        interrupt.deferred() as stop,
        Tracker(config.output_dir, first + 1) as tracker,
        progress("train", config.max_steps, "steps", done=first) as advance,
    ):
        for step in range(first, config.max_steps):
            metrics = train_step(run, step)
            if step == 0:
                _check_step_zero(run, metrics)
            tracker.log(step + 1, metrics)
            advance(1, f"loss {metrics['loss']:.4f}, accuracy {metrics['rewards/accuracies']:.2f}")
            done = step + 1
            if done % config.checkpointing_steps == 0 or done == config.max_steps or stop.requested:
                tracker.sync()
                _save(run, folder, done)
            if stop.requested:
                say(f"stopped after step {done}, which is saved; the same command continues there")
                raise stop.exception
            _preview_if_due(run, done)
    return max(first, config.max_steps)


def train_step(run: Run, step: int) -> dict[str, float]:
    """Take one optimizer step (from 0) over a global batch; return its metrics, means over the batch.

    Raises ConfigError, before the weights are touched, when the loss or the gradient is not finite.
    """
    import torch

    config = run.config
    visits = global_batch(config.seed, len(run.pair_ids), config.global_batch_size, step)
    for group in run.optimizer.param_groups:
        group["lr"] = config.learning_rate * min(1.0, (step + 1) / max(1, config.warmup_steps))
    run.optimizer.zero_grad(set_to_none=True)
    totals: dict[str, Tensor] = {}
    for start in range(0, len(visits), config.per_device_batch_size):
        batch = make_batch(run, visits[start : start + config.per_device_batch_size])
        errors = pair_errors(run.model, batch, needs_reference=run.loss.needs_reference)
        result = run.loss(errors)
        run.scaler.scale(result.loss.sum() / len(visits)).backward()
        for name, value in _per_pair_metrics(errors, result).items():
            totals[name] = totals.get(name, 0) + value.detach().sum() / len(visits)
    run.scaler.unscale_(run.optimizer)
    grad_norm = torch.nn.utils.clip_grad_norm_(run.parameters.values(), config.max_grad_norm)
    metrics = {name: value.item() for name, value in totals.items()}
    metrics |= {"grad_norm": grad_norm.item(), "learning_rate": run.optimizer.param_groups[0]["lr"]}
    _refuse_not_finite(run, step, visits, metrics)
    run.scaler.step(run.optimizer)
    run.scaler.update()
    return metrics


def make_batch(run: Run, visits: Sequence[Visit]) -> PairBatch:
    """Read some visits from the cache and draw their noise, timesteps, dropout and flips."""
    import torch

    config, device = run.config, run.model.device
    random = draw_randomness(
        config.seed,
        visits,
        run.pair_ids,
        run.latent_shape,
        prompt_dropout=config.prompt_dropout,
        random_flip=config.random_flip,
    )
    indices = [visit.index for visit in visits]
    chosen, rejected = run.cache.latents(indices, random.flip.tolist())
    conditioning = run.cache.conditioning(indices, random.drop_prompt.tolist())
    return PairBatch(
        chosen=chosen.to(device),
        rejected=rejected.to(device),
        noise=random.noise.to(device),
        timesteps=run.model.sample_timesteps(random.timestep_uniform).to(device),
        conditioning={name: value.to(device) for name, value in conditioning.items()},
        label_prob=torch.tensor([run.label_probs[i] for i in indices], dtype=torch.float32, device=device),
    )


def _per_pair_metrics(errors: PairErrors, result: PairLoss) -> "dict[str, Tensor]":
    """Metrics of shape (B,), named as in TRL; a tie of rewards counts half towards the accuracy."""
    margins = result.chosen_reward - result.rejected_reward
    metrics = {
        "loss": result.loss,
        "rewards/chosen": result.chosen_reward,
        "rewards/rejected": result.rejected_reward,
        "rewards/margins": margins,
        "rewards/accuracies": (margins > 0).float() + 0.5 * (margins == 0).float(),
        "errors/chosen": errors.chosen,
        "errors/rejected": errors.rejected,
    }
    if errors.reference_chosen is not None and errors.reference_rejected is not None:
        metrics["errors/reference_chosen"] = errors.reference_chosen
        metrics["errors/reference_rejected"] = errors.reference_rejected
    return metrics


def _check_step_zero(run: Run, metrics: Mapping[str, float]) -> None:
    """Before the first update policy and reference are one function: the cheapest detector of a wrong reference."""
    if not run.loss.needs_reference:
        return
    gap = max(abs(metrics["rewards/chosen"]), abs(metrics["rewards/rejected"]))
    assert gap < _STEP_ZERO_TOLERANCE, f"policy and reference differ before the first step: rewards of {gap:.2e}"
    say(f"step 0: policy and reference agree (rewards within {gap:.0e}), loss {metrics['loss']:.6f}")


def _refuse_not_finite(run: Run, step: int, visits: Sequence[Visit], metrics: Mapping[str, float]) -> None:
    names = [name for name, value in metrics.items() if not math.isfinite(value)]
    if run.scaler.is_enabled() and names == ["grad_norm"] and run.scaler.get_scale() >= 1:
        return  # fp16 overflow: the scaler skips this step and lowers its scale, which starts at 65536
    if names:
        pairs = ", ".join(run.pair_ids[visit.index] for visit in visits[:8])
        raise ConfigError(
            f"step {step + 1}: {', '.join(names)} is not finite, so the run stopped before changing the weights. The "
            f"batch held the pairs {pairs}{', ...' if len(visits) > 8 else ''}. Lower learning_rate, use bf16 or fp32 "
            f"instead of fp16, or look at these pairs with `diffusion-dpo inspect`. The last checkpoint in "
            f"{run.config.output_dir / 'checkpoints'} is good"
        )


def _resume(run: Run, folder: Path) -> int:
    """Load the newest whole checkpoint into the run; return its step, 0 for a fresh start."""
    import torch

    found = checkpoint.load_latest(folder)
    if found is None:
        return 0
    with torch.no_grad():
        for name, parameter in run.parameters.items():
            parameter.copy_(found.parts["trained"][name])
            saved = {key: found.parts["optimizer"][f"{name}:{key}"] for key in ("step", "exp_avg", "exp_avg_sq")}
            # like the parameter in layout too (channels_last), or sums are taken in another order than before the stop
            averages = {key: torch.zeros_like(parameter).copy_(saved[key]) for key in ("exp_avg", "exp_avg_sq")}
            run.optimizer.state[parameter] = {"step": saved["step"].to(parameter.device), **averages}
    if found.state["scaler"]:
        run.scaler.load_state_dict(found.state["scaler"])
    if found.step >= run.config.max_steps:
        say(f"{run.config.output_dir} is trained to step {found.step} already; raise max_steps to go on")
    else:
        say(f"continuing after step {found.step} of {run.config.max_steps}")
    return found.step


def _save(run: Run, folder: Path, step: int) -> None:
    optimizer = {
        f"{name}:{key}": value.cpu()
        for name, parameter in run.parameters.items()
        for key, value in run.optimizer.state[parameter].items()
    }
    parts = {
        "trained": {name: parameter.detach().cpu() for name, parameter in run.parameters.items()},
        "optimizer": optimizer,
    }
    checkpoint.save(folder, step, parts, {"scaler": run.scaler.state_dict()}, keep=run.config.checkpoints_total_limit)


def _preview_if_due(run: Run, step: int) -> None:
    """Draw the preview prompts into `previews/step-XXXXXXXX/`, always with the same seeds, what is missing of them."""
    config = run.config
    every = config.preview.every_steps
    if step not in (0, config.max_steps) and not (every and step % every == 0):
        return
    prompts = config.preview.prompts or tuple(dict.fromkeys(run.prompts))[:4]
    folder = config.output_dir / "previews" / f"step-{step:08d}"
    folder.mkdir(parents=True, exist_ok=True)
    requests = [DrawRequest(text, image_seed(config.seed, text, 0)) for text in prompts]
    if all((folder / f"{number:02d}.png").exists() for number in range(len(requests))):
        return
    sampling = config.preview.sampling
    if sampling.resolution_px is None:
        sampling = sampling.model_copy(update={"resolution_px": config.resolution_px})
    for start in range(0, len(requests), sampling.batch_size):
        images = draw(run.model.pipeline, requests[start : start + sampling.batch_size], sampling)
        for number, image in enumerate(images, start=start):
            with atomic_path(folder / f"{number:02d}.png") as partial:
                image.save(partial, format="PNG")


def _prompt_hashes(prompts: Sequence[str]) -> list[str]:
    """Return by what `compare` recognises the prompts that were trained on; of very many, a part that is theirs."""
    return sorted({prompt_hash(prompt) for prompt in prompts})[:_MAX_PROMPT_HASHES]


def _write_text(path: Path, text: str) -> None:
    with atomic_path(path) as partial:
        partial.write_text(text, encoding="utf-8")
