"""Where to compute, and in which number format."""

from typing import TYPE_CHECKING

from diffusion_dpo.config import ConfigError
from diffusion_dpo.processes import told_to_use_cpu

if TYPE_CHECKING:
    import torch


def pick_device(name: str) -> "torch.device":
    """Return the device for `auto`, `cpu`, `cuda` or `mps`; raises ConfigError when it is not there."""
    import torch

    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if told_to_use_cpu() and name == "auto":
        name = "cpu"
    if name == "auto":
        name = next(kind for kind, there in available.items() if there)
    elif not available[name]:
        raise ConfigError(
            f"device is {name!r}, but torch {torch.__version__} sees none here; `diffusion-dpo doctor` says more"
        )
    return torch.device(name, torch.cuda.current_device()) if name == "cuda" else torch.device(name)


def pick_dtype(precision: str, device: "torch.device") -> "torch.dtype":
    """Return the dtype for `auto`, `fp32`, `fp16` or `bf16`; raises ConfigError where the device does not have it."""
    import torch

    if precision == "auto":
        if device.type != "cuda":
            return torch.float32
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    if precision == "fp16" and device.type != "cuda":
        raise ConfigError(f"mixed_precision is fp16, which needs cuda; on {device.type} use fp32 or bf16")
    if precision == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise ConfigError(
            f"mixed_precision is bf16, which {torch.cuda.get_device_name(device)} does not have; use fp16, or auto"
        )
    return {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[precision]
