"""What changes the weights: AdamW, or an optimizer that remembers less."""

import importlib.util
from typing import TYPE_CHECKING, Any

from diffusion_dpo.config import ConfigError
from diffusion_dpo.settings import TrainConfig

if TYPE_CHECKING:
    import torch


def refuse_optimizer(config: TrainConfig, device: "torch.device") -> None:
    """Raise ConfigError where the optimizer cannot run; called before anything slow."""
    if config.optimizer != "adamw_8bit":
        return
    if device.type != "cuda":
        raise ConfigError(f"optimizer=adamw_8bit needs cuda, not {device.type}; take adamw or adafactor")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError("optimizer=adamw_8bit needs bitsandbytes: pip install 'diffusion-dpo[8bit]', or take adamw")


def make_optimizer(config: TrainConfig, parameters: "dict[str, torch.nn.Parameter]") -> "torch.optim.Optimizer":
    """Return the optimizer over the trained weights; `refuse_optimizer` has seen to it that it can run here."""
    import torch

    adam: dict[str, Any] = {"betas": config.adam_betas, "eps": config.adam_epsilon}
    common: dict[str, Any] = {"lr": config.learning_rate, "weight_decay": config.weight_decay}
    if config.optimizer == "adafactor":
        from transformers.optimization import Adafactor

        # as the paper's code sets it for SDXL: a learning rate of ours, not relative to the weights or the step
        return Adafactor(parameters.values(), scale_parameter=False, relative_step=False, **common)
    if config.optimizer == "adamw_8bit":
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit(parameters.values(), **common, **adam)
    return torch.optim.AdamW(parameters.values(), fused=True, **common, **adam)
