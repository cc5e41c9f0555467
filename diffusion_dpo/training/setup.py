"""From settings to a run that is ready for its first step: examples, latent cache, objective, optimizer."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from diffusion_dpo.config import ConfigError
from diffusion_dpo.console import say
from diffusion_dpo.data import PairSource, cache
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
from diffusion_dpo.data.index import Collected
from diffusion_dpo.data.lazy import LazySequence
from diffusion_dpo.data.prompt_words import Told, find_pipeline_cuts
from diffusion_dpo.losses import ListLoss, Loss
from diffusion_dpo.losses.objective import Objective
from diffusion_dpo.models import LoadedModel
from diffusion_dpo.processes import Processes
from diffusion_dpo.settings import TrainConfig
from diffusion_dpo.training import Run, reference
from diffusion_dpo.training.averaging import RunningAverage
from diffusion_dpo.training.batches import Reader
from diffusion_dpo.training.evaluation import HeldOut
from diffusion_dpo.training.health import Health
from diffusion_dpo.training.optimizers import make_optimizer
from diffusion_dpo.training.parallel import distribute

if TYPE_CHECKING:
    import torch

_DECIDE_DRAWS: Any = {
    "seed": True,
    "prompt_dropout": True,
    "random_flip": True,
    "weighting": {"timestep_range", "num_timesteps"},
    "reference": {"num_draws"},
}
_DECIDE_EXAMPLES: Any = {
    "evaluation": {"share", "max_pairs"},
    "swap_labels": True,
    "order": True,
    "curriculum_stages": True,
    "curriculum_steps": True,
    "global_batch_size": True,
}
"""The settings that decide which example is which, and when it is visited."""
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
    if config.aspect_ratio_buckets and (loss.unit == "list" or config.order == "curriculum"):
        what = "loss.type=" + str(loss.type) if loss.unit == "list" else "order=curriculum"
        why = "the images of a ranking share their noise" if loss.unit == "list" else "a curriculum has one order"
        raise ConfigError(f"aspect_ratio_buckets and {what}: {why}, and shapes differ; leave one of them out")
    if config.score_metric is not None and not _looks_at_scores(config):
        raise ConfigError(
            f"score_metric={config.score_metric}, and nothing here looks at scores; leave it out, or take "
            "score_gain_weighting=true, order=curriculum, or an objective that does (capo, rank_dpo, plackett_luce)"
        )
    kind = config.reference.type
    if kind != "auto" and not (loss.needs_reference or config.regularizers.needs_reference):
        raise ConfigError(f"reference.type={kind}, and loss.type={loss.type} has no reference; leave it out")
    if kind == "cached" and config.regularizers.drift:
        raise ConfigError(
            "regularizers.drift is about what the reference predicts, and reference.type=cached keeps its errors "
            "alone; leave one of them out"
        )


def name_ignored(config: TrainConfig) -> None:
    """Say which settings were changed and do nothing beside the others."""
    reference, default = config.reference, TrainConfig()
    idle = {
        "reference.num_draws": reference.type != "cached" and reference.num_draws != default.reference.num_draws,
        "reference.ema_decay": reference.type != "ema" and reference.ema_decay != default.reference.ema_decay,
        "bucket_step_px": not config.aspect_ratio_buckets and config.bucket_step_px != default.bucket_step_px,
        "adam_betas": config.optimizer == "adafactor" and config.adam_betas != default.adam_betas,
        "adam_epsilon": config.optimizer == "adafactor" and config.adam_epsilon != default.adam_epsilon,
    }
    names = [name for name, does_nothing in idle.items() if does_nothing]
    if names:
        say(f"without effect here: {', '.join(names)}")


def hold_out(config: TrainConfig, data: Collected) -> tuple[np.ndarray, np.ndarray]:
    """Return the indices of the pairs to train on and of those held out."""
    share, max_pairs = config.evaluation.share, config.evaluation.max_pairs
    keys = data.prompt_keys[data.prompt_codes]
    return split_held_out(keys, data.is_pair, share=share, max_pairs=max_pairs, seed=config.seed)


def refuse_data(config: TrainConfig, data: Collected, held: np.ndarray) -> None:
    """Raise ConfigError where the data is not of the kind that the settings need."""
    if config.evaluation.max_kl is not None and not len(held):
        raise ConfigError(
            "evaluation.max_kl is measured on held-out pairs, and there are none: raise evaluation.share, bring more "
            "pairs, or set evaluation.max_kl=null"
        )
    if cast(Loss, config.loss).unit == "pair":
        refuse_single_images(data.records, data.is_pair)


def refuse_uneven(config: TrainConfig, processes: Processes) -> None:
    """Raise ConfigError where the processes cannot divide a step among them evenly."""
    unit = config.per_device_batch_size * processes.count
    if config.global_batch_size % unit:
        below = config.global_batch_size // unit * unit
        raise ConfigError(
            f"global_batch_size ({config.global_batch_size}) must be a multiple of per_device_batch_size "
            f"({config.per_device_batch_size}) times the number of processes ({processes.count}); the nearest are "
            f"{' and '.join(str(size) for size in (below, below + unit) if size)}"
        )


def prepare(
    config: TrainConfig,
    model: LoadedModel,
    data: Collected,
    dtype: "torch.dtype",
    processes: Processes = Processes(),  # noqa: B008 - a constant
) -> Run:
    """Encode what is not cached, and set up the optimizer: everything up to the first step."""
    loss = cast(Loss, config.loss)
    train_on, held = hold_out(config, data)
    refuse_data(config, data, held)
    scores = find_scores(config, data)
    examples = make_examples(config, data, train_on, scores)
    _tell_of_prompts(model, data, train_on, held)
    latents = _encode(config, model, data, dtype, processes)
    objective = Objective(
        loss=loss,
        weighting=config.weighting,
        regularizers=config.regularizers,
        safeguard_mu=config.safeguard_mu,
        prediction_type=model.prediction_type,
    )
    held_out = None
    if len(held):
        held = held[np.argsort(latents.bucket_of[held], kind="stable")]  # batches are of one shape
        held_out = HeldOut(
            examples=form_examples(data.records, held, "pair", scores=scores, swap_labels=config.swap_labels),
            prompts=[data.records[index].prompt.strip() for index in held.tolist()],
            cache=latents,
            num_timesteps=config.weighting.num_timesteps or config.evaluation.num_timesteps,
            only_trained=config.weighting.num_timesteps is not None,
            batch_size=config.per_device_batch_size,
            seed=config.seed,
            objective=objective if loss.unit == "pair" else None,
        )
    kind = config.reference.type
    if kind == "frozen_copy" or (kind == "auto" and objective.needs_reference and model.reference_needs_copy):
        model.freeze_copy()
    if config.gradient_checkpointing:
        model.enable_gradient_checkpointing(selective=config.gradient_checkpointing == "selective")
    if config.compile:
        model.compile()
    # while the policy still is the reference, and rounds as it will
    if held_out is not None:
        held_out.ask_reference(model, processes)
    whole_data = isinstance(examples, LazySequence)  # then it is the pairs themselves, in their order
    first_pairs = train_on if whole_data else np.array([example.images[0][0] for example in examples])
    reader = Reader(config, model, examples, latents, first_pairs, processes)
    if kind == "cached":
        reader = replace(reader, cached=_reference_errors(reader, dtype))
    accumulating = distribute(model, processes)
    parameters = model.trainable()
    _announce(reader, held_out, sum(p.numel() for p in parameters.values()), dtype)
    averaged = config.reference.type == "ema"
    return Run(
        config=config,
        model=model,
        objective=objective,
        reader=reader,
        parameters=parameters,
        optimizer=make_optimizer(config, parameters),
        scaler=make_scaler(model.device, dtype),
        averaged=RunningAverage(parameters, config.reference.ema_decay) if averaged else None,
        ema=RunningAverage(parameters, config.ema_decay) if config.ema_decay else None,
        held_out=held_out,
        health=Health(),
        accumulating=accumulating,
    )


def make_scaler(device: "torch.device", dtype: "torch.dtype") -> "torch.amp.GradScaler":
    """Return the scaler of the loss, which does something for float16 only."""
    import torch

    return torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)


def _reference_errors(reader: Reader, dtype: "torch.dtype") -> reference.CachedErrors:
    config = reader.config
    facts = {
        "base_weights": reader.model.base_hash,
        "encoded": reader.cache.name,
        "precision": str(dtype).removeprefix("torch.") + (", compiled" if config.compile else ""),
        "draws": config.model_dump(mode="json", include=_DECIDE_DRAWS),
        "examples": config.model_dump(mode="json", include=_DECIDE_EXAMPLES) | _ranked_by(config),
    }
    return reference.build(config.cache_dir or config.output_dir / "cache", reader, facts)


def _encode(
    config: TrainConfig, model: LoadedModel, data: Collected, dtype: "torch.dtype", processes: Processes
) -> cache.LatentCache:
    """Return the cache of latents and prompts."""
    import torch

    side = config.resolution_px or model.resolution_px
    if side % model.downscale:
        raise ConfigError(f"resolution_px is {side}; this model needs a multiple of {model.downscale}")
    if config.aspect_ratio_buckets and config.bucket_step_px % model.downscale:
        raise ConfigError(
            f"bucket_step_px is {config.bucket_step_px}; this model needs a multiple of {model.downscale}"
        )
    latents = cache.build(
        config.cache_dir or config.output_dir / "cache",
        data,
        cache.Encoders(
            images=model.encode_images,
            prompts=model.encode_prompts,
            fingerprint=model.encoder_hash,
            latent_channels=model.latent_channels,
            downscale=model.downscale,
            resolution_px=side,
            dtype=torch.float32 if dtype == torch.float32 else torch.float16,
            batch_size=min(8, config.per_device_batch_size),
        ),
        random_flip=config.random_flip,
        bucket_step_px=config.bucket_step_px if config.aspect_ratio_buckets else None,
        processes=processes,
    )
    if config.aspect_ratio_buckets:
        names, counts = np.unique(latents.bucket_of, return_counts=True)
        shapes = [latents.shapes[name] for name in names]
        sizes = [f"{shape[2] * model.downscale}x{shape[1] * model.downscale}" for shape in shapes]
        say("buckets: " + ", ".join(f"{count} pairs in {size}" for size, count in zip(sizes, counts, strict=True)))
    return latents


def _tell_of_prompts(model: LoadedModel, data: Collected, train_on: np.ndarray, held: np.ndarray) -> None:
    """Say which prompts are not taken as they were meant, and whether what is held out is trained on all the same."""
    told = Told()
    told.of_syntax(data.prompts)
    cuts = find_pipeline_cuts(getattr(model, "pipeline", None), data.prompts)
    told.once(cuts.describe(partial(_place, data)))
    if cuts.kept and len(held):
        sides = ({data.prompts[number] for number in np.unique(data.prompt_codes[rows])} for rows in (held, train_on))
        shared = cuts.num_shared(*sides)
        if shared:
            told.once(
                f"{shared} held-out prompts become the same as prompts that are trained on, so that the held-out "
                "numbers look better than they are; shorten the prompts, or hold out data of your own"
            )


def _place(data: Collected, prompt: str) -> str:
    """Return where a prompt first is."""
    number = next(number for number, other in enumerate(data.prompts) if other == prompt)
    return data.records[int((data.prompt_codes == number).argmax())].where


def make_examples(
    config: TrainConfig, data: Collected, train_on: np.ndarray, scores: ScoreTable | None
) -> Sequence[Example]:
    """Return what is trained on, in the order that a curriculum asks for; raises ConfigError when there is nothing."""
    loss = cast(Loss, config.loss)
    examples = form_examples(
        data.records,
        train_on,
        loss.unit,
        scores=scores,
        list_size=loss.list_size if isinstance(loss, ListLoss) else 2,
        swap_labels=config.swap_labels,
    )
    num_left_out = len(np.unique(data.prompt_codes[train_on])) - len(examples)
    if loss.unit == "list" and num_left_out:
        say(f"{num_left_out} prompts have fewer than loss.list_size distinct images and are left out")
    if config.score_gain_weighting:
        examples = weigh_by_gain(examples)
    return easiest_first(examples) if config.order == "curriculum" else examples


def _ranked_by(config: TrainConfig) -> dict[str, Any]:
    """What decides, beside the settings, which images make an example, and in which order."""
    loss = cast(Loss, config.loss)
    facts: dict[str, Any] = {"unit": loss.unit}
    if _looks_at_scores(config):
        facts |= {"loss": loss.type, "score_metric": config.score_metric}
    return facts | ({"list_size": loss.list_size} if isinstance(loss, ListLoss) else {})


def _looks_at_scores(config: TrainConfig) -> bool:
    return cast(Loss, config.loss).needs_scores or config.score_gain_weighting or config.order == "curriculum"


def find_scores(config: TrainConfig, data: Collected) -> ScoreTable | None:
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


def _announce(reader: Reader, held_out: HeldOut | None, num_weights: int, dtype: "torch.dtype") -> None:
    config, examples = reader.config, reader.examples
    loss = cast(Loss, config.loss)
    apart = "no pairs are held out" + (" (too few, or single images)" if config.evaluation.share else "")
    if held_out is not None:
        apart = f"{len(held_out.examples)} pairs of {len(set(held_out.prompts))} prompts are held out"
    say(
        f"train: {loss.type} on {len(examples)} {_UNITS[loss.unit]}, {apart}; {num_weights:,} trained weights, "
        f"{config.max_steps} steps of {config.global_batch_size} ("
        + (f"{reader.processes.count} processes x " if reader.processes.count > 1 else "")
        + f"{reader.num_micro_batches} x {config.per_device_batch_size}), "
        f"{config.max_steps * config.global_batch_size / len(examples):.1f} epochs, "
        f"on {reader.model.device.type} in {str(dtype).removeprefix('torch.')}"
    )
