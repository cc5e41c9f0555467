"""What of a run has to survive it: trained weights, optimizer, the averaged reference, and a few numbers.

Order, noise, timesteps and dropout are functions of the step and need not be kept.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from diffusion_dpo import card, checkpoint
from diffusion_dpo.config import ConfigError, ForeignPlugin, load
from diffusion_dpo.models import DiffusionModel
from diffusion_dpo.settings import TrainConfig
from diffusion_dpo.training import Run
from diffusion_dpo.training.averaging import RunningAverage
from diffusion_dpo.training.health import Health
from diffusion_dpo.training.parallel import put, whole

if TYPE_CHECKING:
    from torch import Tensor


def save(run: Run, folder: Path, step: int) -> None:
    """Write a checkpoint, of the state after `step` steps; raises ConfigError when its weights are not finite."""
    import torch

    if not is_finite(run):
        raise ConfigError(
            f"after step {step} the weights are not finite, so nothing was saved: learning_rate="
            f"{run.config.learning_rate:g} is too large"
        )
    optimizer = {
        f"{name}:{key}": value
        for name, parameter in run.parameters.items()
        for key, value in run.optimizer.state[parameter].items()
    }
    parts: dict[str, dict[str, Tensor]] = {
        "trained": _collected(run, run.parameters),
        "optimizer": _collected(run, {k: value for k, value in optimizer.items() if isinstance(value, torch.Tensor)}),
    }
    for part, average in _averages(run).items():
        parts[part] = _collected(run, average.values)
    state = {
        "run": run.identity,
        "optimizer": {key: value for key, value in optimizer.items() if not isinstance(value, torch.Tensor)},
        "scaler": run.scaler.state_dict(),
        "health": run.health.to_json(),
        "kl": run.kl,
        "kl_base": run.kl_base,
    }
    if run.processes.is_main:
        checkpoint.save(folder, step, parts, state, keep=run.config.checkpoints_total_limit)
    run.processes.wait()  # nobody goes on, or leaves, before it is whole


def is_finite(run: Run) -> bool:
    """Whether all weights are finite; every process has to call this."""
    import torch

    sizes = [whole(size) for size in torch._foreach_norm(list(run.parameters.values()), math.inf)]
    return bool(torch.stack(sizes).max().isfinite())


def refuse_not_finite_result(run: Run, folder: Path) -> None:
    """Raise ConfigError, naming the last good checkpoint, where what would be the result is not finite."""
    if is_finite(run):
        return
    last = max(folder.glob("step-*"), default=None)
    good = "there is no checkpoint" if last is None else f"the last good checkpoint is {last}"
    raise ConfigError(
        f"the trained weights are not finite, so nothing was saved in the place of what was there; {good}. The same "
        "command goes on from it; if it ends here again, lower learning_rate"
    )


def resume(run: Run, folder: Path) -> int:
    """Load the newest whole checkpoint into the run; return its step, 0 for a fresh start.

    Raises ConfigError when it is another run's.
    """
    import torch

    found = checkpoint.load_latest(folder)
    step = 0 if found is None else found.step
    newest, oldest = run.processes.highest(step), -run.processes.highest(-step)
    if newest != oldest:
        raise ConfigError(
            f"the processes see different checkpoints in {folder} (of step {oldest} and {newest}); put output_dir "
            "where all machines see it"
        )
    if found is None:
        return 0
    if found.state["run"] != run.identity:
        raise ConfigError(
            f"the checkpoint of step {found.step} in {folder} was saved by another run, with other settings, data or "
            "weights; move it away to go on from the one before it"
        )
    averages = {part: average.values for part, average in _averages(run).items()}
    checkpoint.refuse_misfit(found, {"trained": run.parameters, "optimizer": {}, **averages}, folder)
    optimizer: dict[str, Any] = {**found.parts["optimizer"], **found.state["optimizer"]}
    with torch.no_grad():
        for name, parameter in run.parameters.items():
            put(parameter, found.parts["trained"][name])
        for key, value in optimizer.items():  # nothing before the first step that is taken: fp16 skips some
            name, _, what = key.rpartition(":")
            run.optimizer.state[run.parameters[name]][what] = _beside(run.parameters[name], value)
        for part, average in _averages(run).items():
            for name, value in average.values.items():
                put(value, found.parts[part][name])
    if found.state["scaler"]:
        run.scaler.load_state_dict(found.state["scaler"])
    run.health = Health.from_json(found.state["health"])
    run.kl, run.kl_base = found.state["kl"], found.state["kl_base"]
    return found.step


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder is a checkpoint of a run, `<run>/checkpoints/step-...`."""
    return folder.parent.name == "checkpoints" and folder.name.startswith("step-") and folder.is_dir()


def run_of(folder: Path) -> Path:
    """Return the run folder that a checkpoint is in."""
    return folder.parent.parent


def settings_of(folder: Path) -> TrainConfig:
    """Return the settings of the run that a checkpoint is in, as data; raises ConfigError for a model from outside."""
    config = load(TrainConfig, run_of(folder) / "config.yaml", is_data=True)
    if isinstance(config.model, ForeignPlugin):
        raise ConfigError(
            f"{folder} is of a model of somebody's own, {config.model.type}, whose code is not run on the word of a "
            f"folder; only what training saved in {run_of(folder)} can be taken"
        )
    return config


def save_result(folder: Path, output_dir: Path) -> Path:
    """Write the adapter or UNet that training would have ended with at a checkpoint; return its folder.

    The run's config.yaml says what the weights belong to. Raises ConfigError when it or the checkpoint is damaged.
    """
    import torch

    config = settings_of(folder)
    found = checkpoint.load(folder)
    model = cast(DiffusionModel, config.model).load(device=torch.device("cpu"), dtype=torch.float32, seed=config.seed)
    part = "ema" if "ema" in found.parts else "trained"
    checkpoint.refuse_misfit(found, {part: model.trainable()}, folder.parent)
    with torch.no_grad():
        for name, parameter in model.trainable().items():
            put(parameter, found.parts[part][name])
    output_dir.mkdir(parents=True, exist_ok=True)
    return card.save_model(model, output_dir)


def _collected(run: Run, tensors: "Mapping[str, Tensor]") -> "dict[str, Tensor]":
    """Return whole tensors on the CPU of the main process, of any other nothing; every process has to call this."""
    found = {}
    for name, tensor in tensors.items():
        full = whole(tensor)
        if run.processes.is_main:
            found[name] = full.cpu()
    return found


def _averages(run: Run) -> dict[str, RunningAverage]:
    found = {"averaged": run.averaged, "ema": run.ema}
    return {part: average for part, average in found.items() if average is not None}


def _beside(parameter: "Tensor", saved: Any) -> Any:
    """Return what an optimizer had for a parameter on its device, and in its layout where it has its shape.

    In another layout than before the stop (channels_last), sums would be taken in another order.
    """
    import torch

    if not isinstance(saved, torch.Tensor):
        return saved
    if saved.shape != parameter.shape:
        return saved.to(parameter.device)
    value = torch.zeros_like(parameter, dtype=saved.dtype)
    put(value, saved)
    return value
