"""`train --dry-run`: what a run will take in steps, disk and memory, before it takes anything. Writes nothing.

The memory is an estimate (training/memory.py). For cards other than the one at hand it is that of CUDA in bfloat16.
"""

import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any, cast

import numpy as np

from diffusion_dpo.config import ConfigError
from diffusion_dpo.console import say, show, warn
from diffusion_dpo.data import PairSource, collect
from diffusion_dpo.data.recognise import settle
from diffusion_dpo.device import pick_device, pick_dtype
from diffusion_dpo.settings import TrainConfig
from diffusion_dpo.training import setup
from diffusion_dpo.training.memory import GIB, Estimator, images_per_example, make_estimator
from diffusion_dpo.training.optimizers import refuse_optimizer
from diffusion_dpo.training.skeleton import NoEstimateError

CARDS_GB = (8, 12, 16, 24, 80)
_USABLE = 0.97
"""Assumed: the share of a card that the driver and a screen leave."""
_CHECKPOINTING: tuple[Any, ...] = (False, "selective", True)
"""The cheapest in speed first; what comes after costs up to a quarter of it."""
_OPTIMIZERS: tuple[dict[str, str], ...] = (
    {},
    {"optimizer": "adamw_8bit"},
    {"optimizer": "adamw_8bit", "reference.type": "cached"},
    {"optimizer": "adafactor", "reference.type": "cached"},
)
"""For whole UNets; a LoRA's state is too small to matter, and its reference is no copy."""


def run(config: TrainConfig) -> None:
    """Print what a run of one process with these settings will take; raises ConfigError where `train` refuses them."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("--dry-run runs in one process, and WORLD_SIZE is above 1; start it without a launcher")
    setup.refuse_contradictions(config)
    setup.name_ignored(config)
    config = settle(config)
    device = pick_device(config.device)
    refuse_optimizer(config, device)
    dtype = pick_dtype(config.mixed_precision, device)
    estimator: Estimator | None = None
    try:
        estimator = make_estimator(config, device.type, dtype)
    except NoEstimateError as error:
        warn(str(error))
    index_dir = (config.cache_dir or config.output_dir / "cache") / "index"
    data = collect.collect(
        cast(PairSource, config.data), max_broken_share=config.max_broken_share, index_dir=index_dir
    )
    train_on, held = setup.hold_out(config, data)
    setup.refuse_data(config, data, held)
    examples = setup.make_examples(config, data, train_on, setup.find_scores(config, data))
    say("dry run: nothing is written, encoded or trained")
    epochs = config.max_steps * config.global_batch_size / len(examples)
    say(
        f"steps: {config.max_steps}, each of {config.gradient_accumulation_steps} micro-batches of "
        f"{config.per_device_batch_size}: {epochs:.1f} epochs of {len(examples)} examples from {len(train_on)} pairs"
    )
    say(f"held out: {len(held)} pairs of {len(np.unique(data.prompt_keys[data.prompt_codes[held]]))} prompts")
    if estimator is None:
        return
    _say_disk(config, estimator, len(data), len(data.prompts), len(examples), masked=data.has_masks)
    _say_memory(config, estimator, f"{device.type} in {str(dtype).removeprefix('torch.')}")
    _show_cards(config, _for_cards(config, estimator))


def relief(config: TrainConfig) -> list[str]:
    """Return the three changes of settings that help most against running out of memory, with what they save.

    Raises ConfigError when there is no estimate. What the process itself takes is left out on the CPU: by now it is
    more than at the start of a run.
    """
    device = pick_device(config.device)
    estimator = make_estimator(config, device.type, pick_dtype(config.mixed_precision, device))
    if device.type != "cuda":
        estimator = replace(estimator, process_bytes=0)
    now = estimator.estimate(config).total
    size = config.per_device_batch_size
    half = next((n for n in range(size // 2, 0, -1) if config.global_batch_size % n == 0), size)
    changes: list[dict[str, Any]] = [
        {"gradient_checkpointing": True},
        {"per_device_batch_size": half},
        {"optimizer": "adamw_8bit" if device.type == "cuda" and find_spec("bitsandbytes") else "adafactor"},
        {"reference.type": "cached"},
        {"preview": None},
    ]
    after = {}
    for change in changes:
        changed = _with(config, change)
        try:
            setup.refuse_contradictions(changed)
        except ConfigError:
            continue
        another = " with a new output_dir" if change.keys() & {"optimizer", "reference.type"} else ""
        after[_typed(change) + another] = estimator.estimate(changed).total
    best = sorted((total, text) for text, total in after.items() if total < 0.99 * now)[:3]
    return [f"{text}: {_size(now)} -> {_size(total)}" for total, text in best]


# --- disk ------------------------------------------------------------------------------------------------------------


def _say_disk(
    config: TrainConfig, estimator: Estimator, num_pairs: int, num_prompts: int, num_examples: int, *, masked: bool
) -> None:
    skeleton = estimator.skeleton
    unet, positions = skeleton.unet.config, (skeleton.resolution_px // skeleton.downscale) ** 2
    itemsize = 4 if skeleton.dtype.itemsize == 4 else 2
    views = 2 if config.random_flip else 1
    latents = num_pairs * views * positions * (2 * unet.in_channels * itemsize + (4 if masked else 0))
    texts = (num_prompts + 1) * skeleton.num_tokens * unet.cross_attention_dim * itemsize
    sizes = {"latents": latents, "prompts": texts}
    if config.reference.type == "cached":
        epochs = -(-config.max_steps * config.global_batch_size // num_examples)
        draws = num_examples * min(epochs, config.reference.num_draws)
        sizes["reference errors"] = draws * (4 * images_per_example(config) + 16)  # and which draw, which example
    held = estimator.held(config)
    weights = sum(4 * parameter.numel() for parameter in skeleton.trained())
    checkpoint = weights + held["optimizer state"] + held["running averages"]
    where = config.cache_dir or config.output_dir / "cache"
    parts = ", ".join(f"{name} {_size(value)}" for name, value in sizes.items())
    say(
        f"disk: {_size(sum(sizes.values()))} of cache ({parts}), less what is there already, in {where}, where "
        f"{_size(_free(where))} are free; {config.checkpoints_total_limit} checkpoints of {_size(checkpoint)} in "
        f"{config.output_dir}, where {_size(_free(config.output_dir))} are free"
    )


def _free(path: Path) -> int:
    """Return the free bytes of the disk where a folder is or will be."""
    path = path.resolve()
    return shutil.disk_usage(next(place for place in (path, *path.parents) if place.exists())).free


def _size(num_bytes: float) -> str:
    return f"{num_bytes / GIB:.1f} GiB" if num_bytes >= GIB else f"{num_bytes / 2**20:.1f} MiB"


# --- memory ----------------------------------------------------------------------------------------------------------


def _say_memory(config: TrainConfig, estimator: Estimator, where: str) -> None:
    found = estimator.estimate(config)
    lines = [f"  {name:<32}{_size(value):>10}" for name, value in found.parts.items() if value > 0]
    peaks = ", ".join(f"{_size(value)} while {name}" for name, value in found.phases.items())
    say("\n".join([f"memory on {where}, estimated, at the peak of a step:", *lines, f"  in all: {peaks}"]))
    if config.compile:
        say("  compile=true is not estimated: usually it needs less")


def _for_cards(config: TrainConfig, estimator: Estimator) -> Estimator:
    """The estimator of this run on CUDA, in its precision; auto is bfloat16 there."""
    import torch

    dtypes: dict[str, torch.dtype] = {"fp32": torch.float32, "fp16": torch.float16}
    dtype = dtypes.get(config.mixed_precision, torch.bfloat16)
    if estimator.skeleton.on_cuda and estimator.skeleton.dtype == dtype:
        return estimator
    return make_estimator(config, "cuda", dtype)


def _show_cards(config: TrainConfig, estimator: Estimator) -> None:
    from rich.table import Table

    precision = str(estimator.skeleton.dtype).removeprefix("torch.")
    say(f"cards, estimated for cuda in {precision}; of the settings that fit, those that cost the least speed:")
    table = Table(box=None, pad_edge=False)
    for name, side in (("card", "right"), ("needs", "right"), ("settings", "left")):
        table.add_column(name, justify=cast(Any, side))
    for card in CARDS_GB:
        size, total, changes = fitting(config, estimator, card * GIB * _USABLE)
        settings = _typed({"per_device_batch_size": size, **changes}) if size else "does not fit"
        table.add_row(f"{card} GB", _size(total), settings)
    show(table)


def fitting(config: TrainConfig, estimator: Estimator, budget: float) -> tuple[int, float, dict[str, Any]]:
    """Return the changes of settings that cost least speed and fit `budget` bytes: micro-batch, bytes, changes.

    Where nothing fits, the micro-batch is 0 and the bytes are the least that one example needs.
    """
    least: tuple[float, dict[str, Any]] | None = None
    for changes in _ladder(config):
        changed = _with(config, changes)
        size = estimator.largest_batch(changed, budget)
        if size:
            found = estimator.estimate(_with(changed, {"per_device_batch_size": size}), exact=False)
            return size, found.total, changes
        total = estimator.estimate(_with(changed, {"per_device_batch_size": 1})).total
        least = min((total, changes), least or (total, changes), key=lambda entry: entry[0])
    assert least is not None
    return 0, *least


def _ladder(config: TrainConfig) -> Iterator[dict[str, Any]]:
    """Changes of settings, the cheapest in speed first, without those that change nothing."""
    model: Any = config.model
    for checkpointing, others in product(_CHECKPOINTING, _OPTIMIZERS if model.lora is None else ({},)):
        changes = {"gradient_checkpointing": checkpointing, **others}
        yield {key: value for key, value in changes.items() if _value(config, key) != value}


def _value(config: TrainConfig, key: str) -> Any:
    value: Any = config
    for name in key.split("."):
        value = getattr(value, name)
    return value


def _with(config: TrainConfig, changes: dict[str, Any]) -> TrainConfig:
    """Return the settings with some changed, by their dotted names."""
    update: dict[str, Any] = {}
    for key, value in changes.items():
        block, _, leaf = key.rpartition(".")
        if block:
            update[block] = getattr(config, block).model_copy(update={leaf: value})
        else:
            update[key] = value
    return config.model_copy(update=update)


def _typed(changes: dict[str, Any]) -> str:
    """Return settings as one types them."""
    words = {True: "true", False: "false", None: "null"}
    return " ".join(
        f"{key}={words[value] if value is None or isinstance(value, bool) else value}"
        for key, value in changes.items()
    )
