"""What changes the weights: AdamW, or an optimizer that remembers less."""

from typing import TYPE_CHECKING, Any

from diffusion_dpo.config import ConfigError
from diffusion_dpo.settings import TrainConfig

if TYPE_CHECKING:
    import torch


def make_optimizer(
    config: TrainConfig, parameters: "dict[str, torch.nn.Parameter]", device: "torch.device"
) -> "torch.optim.Optimizer":
    """Return the optimizer over the trained weights; raises ConfigError where it cannot run here."""
    import torch

    adam: dict[str, Any] = {"betas": config.adam_betas, "eps": config.adam_epsilon}
    common: dict[str, Any] = {"lr": config.learning_rate, "weight_decay": config.weight_decay}
    if config.optimizer == "adafactor":
        from transformers.optimization import Adafactor

        # as the paper's code sets it for SDXL: a learning rate of ours, not relative to the weights or the step
        return Adafactor(parameters.values(), scale_parameter=False, relative_step=False, **common)
    if config.optimizer == "adamw_8bit":
        if device.type != "cuda":
            raise ConfigError(f"optimizer=adamw_8bit needs cuda, not {device.type}; take adamw or adafactor")
        try:
            from bitsandbytes.optim import AdamW8bit
        except ImportError as error:
            raise ConfigError(
                f"optimizer=adamw_8bit needs bitsandbytes ({error}); install it: pip install 'diffusion-dpo[8bit]'"
            ) from error
        return AdamW8bit(parameters.values(), **common, **adam)
    return torch.optim.AdamW(parameters.values(), fused=True, **common, **adam)
