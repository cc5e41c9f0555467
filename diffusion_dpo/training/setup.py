"""From settings to a run that is ready for its first step: examples, latent cache, objective, optimizer."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

from diffusion_dpo.config import ConfigError
from diffusion_dpo.console import say
from diffusion_dpo.data import PairSource, cache
from diffusion_dpo.data.collect import Collected
from diffusion_dpo.data.examples import (
    Example,
    ScoreTable,
    easiest_first,
    form_examples,
    read_scores,
    refuse_single_images,
    split_held_out,
    weigh_by_gain,
)
from diffusion_dpo.losses import ListLoss, Loss
from diffusion_dpo.losses.objective import Objective
from diffusion_dpo.models import LoadedModel
from diffusion_dpo.settings import TrainConfig
from diffusion_dpo.training import Run
from diffusion_dpo.training.averaging import AveragedReference
from diffusion_dpo.training.batches import Reader
from diffusion_dpo.training.evaluation import HeldOut
from diffusion_dpo.training.health import Health

if TYPE_CHECKING:
    import torch

_UNITS = {"pair": "pairs", "image": "images", "chosen": "chosen images", "list": "rankings"}


def refuse_contradictions(config: TrainConfig) -> None:
    """Raise ConfigError where settings do not go together; called before anything slow."""
    loss = cast(Loss, config.loss)
    by_pair = {
        "safeguard_mu": config.safeguard_mu is not None,
        "score_gain_weighting": config.score_gain_weighting,
        "order=curriculum": config.order == "curriculum",
    }
    for name, asked in by_pair.items():
        if asked and loss.unit != "pair":
            raise ConfigError(
                f"{name} is about the two images of a pair, and loss.type={loss.type} learns from "
                f"{_UNITS[loss.unit]}; leave it out, or take an objective over pairs such as dpo"
            )
    if config.score_metric is not None and not _looks_at_scores(config):
        raise ConfigError(
            f"score_metric={config.score_metric}, and nothing here looks at scores; leave it out, or take "
            "score_gain_weighting=true, order=curriculum, or an objective that does (capo, rank_dpo, plackett_luce)"
        )
    if config.reference.type == "ema" and not (loss.needs_reference or config.regularizers.needs_reference):
        raise ConfigError(f"reference.type=ema, and loss.type={loss.type} has no reference; leave it out")


def hold_out(config: TrainConfig, data: Collected) -> tuple[list[int], list[int]]:
    """Return the indices of the pairs to train on and of those held out."""
    share, max_pairs = config.evaluation.share, config.evaluation.max_pairs
    return split_held_out(data.records, share=share, max_pairs=max_pairs, seed=config.seed)


def prepare(config: TrainConfig, model: LoadedModel, data: Collected, dtype: "torch.dtype") -> Run:
    """Encode what is not cached, and set up the optimizer: everything up to the first step."""
    loss = cast(Loss, config.loss)
    train_on, held = hold_out(config, data)
    if config.evaluation.max_kl is not None and not held:
        raise ConfigError(
            "evaluation.max_kl is measured on held-out pairs, and there are none: raise evaluation.share, bring more "
            "pairs, or set evaluation.max_kl=null"
        )
    if loss.unit == "pair":
        refuse_single_images(data.records)
    scores = _scores(config, data)
    examples = _examples(config, data, train_on, scores)
    latents, latent_shape = _encode(config, model, data, dtype)
    objective = Objective(
        loss=loss,
        weighting=config.weighting,
        regularizers=config.regularizers,
        safeguard_mu=config.safeguard_mu,
        prediction_type=model.prediction_type,
    )
    held_out = None
    if held:
        held_out = HeldOut(
            examples=form_examples(data.records, held, "pair", scores=scores, swap_labels=config.swap_labels),
            prompts=[data.records[index].prompt.strip() for index in held],
            cache=latents,
            latent_shape=latent_shape,
            num_timesteps=config.evaluation.num_timesteps,
            batch_size=config.per_device_batch_size,
            seed=config.seed,
            objective=objective if loss.unit == "pair" else None,
        )
    if config.gradient_checkpointing:
        model.enable_gradient_checkpointing(selective=config.gradient_checkpointing == "selective")
    if getattr(config.model, "lora", None) is None:
        model.freeze_copy()
    parameters = model.trainable()
    _announce(config, model, examples, held_out, sum(p.numel() for p in parameters.values()), dtype)
    optimizer, scaler = make_optimizer(config, parameters, model.device, dtype)
    return Run(
        config=config,
        model=model,
        objective=objective,
        reader=Reader(config, model, examples, latents, latent_shape),
        parameters=parameters,
        optimizer=optimizer,
        scaler=scaler,
        averaged=AveragedReference(parameters, config.reference.ema_decay) if config.reference.type == "ema" else None,
        held_out=held_out,
        health=Health(),
    )


def make_optimizer(
    config: TrainConfig,
    parameters: "dict[str, torch.nn.Parameter]",
    device: "torch.device",
    dtype: "torch.dtype",
) -> "tuple[torch.optim.AdamW, torch.amp.GradScaler]":
    """Return AdamW over the trained weights, and the loss scaler, which does something for float16 only."""
    import torch

    optimizer = torch.optim.AdamW(
        parameters.values(),
        lr=config.learning_rate,
        betas=config.adam_betas,
        eps=config.adam_epsilon,
        weight_decay=config.weight_decay,
        fused=True,
    )
    return optimizer, torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)


def _encode(
    config: TrainConfig, model: LoadedModel, data: Collected, dtype: "torch.dtype"
) -> tuple[cache.LatentCache, tuple[int, int, int]]:
    """Return the cache of latents and prompts, and the shape of one image's latents."""
    import torch

    side = config.resolution_px or model.resolution_px
    if side % model.downscale:
        raise ConfigError(f"resolution_px is {side}; this model needs a multiple of {model.downscale}")
    latent_shape = (model.latent_channels, side // model.downscale, side // model.downscale)
    latents = cache.build(
        config.cache_dir or config.output_dir / "cache",
        data,
        [record.pair_id for record in data.records],
        [record.prompt for record in data.records],
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
        masked=any(record.has_mask for record in data.records),
    )
    return latents, latent_shape


def _examples(
    config: TrainConfig, data: Collected, train_on: Sequence[int], scores: ScoreTable | None
) -> list[Example]:
    loss = cast(Loss, config.loss)
    examples = form_examples(
        data.records,
        train_on,
        loss.unit,
        scores=scores,
        list_size=loss.list_size if isinstance(loss, ListLoss) else 2,
        swap_labels=config.swap_labels,
    )
    num_left_out = len({data.records[index].prompt for index in train_on}) - len(examples)
    if loss.unit == "list" and num_left_out:
        say(f"{num_left_out} prompts have fewer than loss.list_size distinct images and are left out")
    if config.score_gain_weighting:
        examples = weigh_by_gain(examples)
    return easiest_first(examples) if config.order == "curriculum" else examples


def _looks_at_scores(config: TrainConfig) -> bool:
    return cast(Loss, config.loss).needs_scores or config.score_gain_weighting or config.order == "curriculum"


def _scores(config: TrainConfig, data: Collected) -> ScoreTable | None:
    """Return the scores that something looks at, None when nothing does."""
    if not _looks_at_scores(config):
        return None
    metric = config.score_metric
    if metric is None:
        labelled_by = cast(PairSource, config.data).labelled_by()
        if len(labelled_by) != 1:
            first = data.records[0]
            known = ", ".join(sorted({*first.chosen_scores, *first.rejected_scores})) or "none"
            raise ConfigError(
                "this training looks at scores (for its objective, its weights or its order), and the data does not "
                f"say which metric labelled it; set score_metric to one of those that its images have: {known}"
            )
        metric = labelled_by[0]
    return read_scores(data.records, metric, cast(Loss, config.loss).calibrate)


def _announce(
    config: TrainConfig,
    model: LoadedModel,
    examples: Sequence[Example],
    held_out: HeldOut | None,
    num_weights: int,
    dtype: "torch.dtype",
) -> None:
    loss = cast(Loss, config.loss)
    apart = "no pairs are held out" + (" (too few, or single images)" if config.evaluation.share else "")
    if held_out is not None:
        apart = f"{len(held_out.examples)} pairs of {len(set(held_out.prompts))} prompts are held out"
    say(
        f"train: {loss.type} on {len(examples)} {_UNITS[loss.unit]}, {apart}; {num_weights:,} trained weights, "
        f"{config.max_steps} steps of {config.global_batch_size} ({config.gradient_accumulation_steps} x "
        f"{config.per_device_batch_size}), {config.max_steps * config.global_batch_size / len(examples):.1f} epochs, "
        f"on {model.device.type} in {str(dtype).removeprefix('torch.')}"
    )
