"""What of a run has to survive it: trained weights, optimizer, the averaged reference, and a few numbers.

Order, noise, timesteps and dropout are functions of the step and need not be kept.
"""

import math
from pathlib import Path
from typing import TYPE_CHECKING

from diffusion_dpo import checkpoint
from diffusion_dpo.config import ConfigError
from diffusion_dpo.training import Run
from diffusion_dpo.training.health import Health

if TYPE_CHECKING:
    from torch import Tensor

_MOMENTS = ("exp_avg", "exp_avg_sq")


def save(run: Run, folder: Path, step: int) -> None:
    """Write a checkpoint, of the state after `step` steps; raises ConfigError when its weights are not finite."""
    import torch

    sizes = torch._foreach_norm(list(run.parameters.values()), math.inf)
    if not torch.stack(sizes).max().isfinite():
        raise ConfigError(
            f"after step {step} the weights are not finite, so nothing was saved: learning_rate="
            f"{run.config.learning_rate:g} is too large"
        )
    parts: dict[str, dict[str, Tensor]] = {
        "trained": {name: parameter.detach().cpu() for name, parameter in run.parameters.items()},
        "optimizer": {
            f"{name}:{key}": value.cpu()
            for name, parameter in run.parameters.items()
            for key, value in run.optimizer.state[parameter].items()
        },
    }
    if run.averaged is not None:
        parts["averaged"] = {name: value.cpu() for name, value in run.averaged.average.items()}
    state = {"run": run.identity, "scaler": run.scaler.state_dict(), "health": run.health.to_json(), "kl": run.kl}
    checkpoint.save(folder, step, parts, state, keep=run.config.checkpoints_total_limit)


def resume(run: Run, folder: Path) -> int:
    """Load the newest whole checkpoint into the run; return its step, 0 for a fresh start.

    Raises ConfigError when it is another run's.
    """
    import torch

    found = checkpoint.load_latest(folder)
    if found is None:
        return 0
    if found.state["run"] != run.identity:
        raise ConfigError(
            f"the checkpoint of step {found.step} in {folder} was saved by another run, with other settings, data or "
            "weights; move it away to go on from the one before it"
        )
    with torch.no_grad():
        for name, parameter in run.parameters.items():
            parameter.copy_(found.parts["trained"][name])
            if f"{name}:step" not in found.parts["optimizer"]:  # no step was taken yet: fp16 skips the first ones
                continue
            saved = {key: found.parts["optimizer"][f"{name}:{key}"] for key in ("step", *_MOMENTS)}
            # like the parameter in layout too (channels_last), or sums are taken in another order than before the stop
            moments = {key: torch.zeros_like(parameter).copy_(saved[key]) for key in _MOMENTS}
            run.optimizer.state[parameter] = {"step": saved["step"].to(parameter.device), **moments}
        if run.averaged is not None:
            for name, average in run.averaged.average.items():
                average.copy_(found.parts["averaged"][name])
    if found.state["scaler"]:
        run.scaler.load_state_dict(found.state["scaler"])
    run.health = Health.from_json(found.state["health"])
    run.kl = found.state["kl"]
    return found.step
