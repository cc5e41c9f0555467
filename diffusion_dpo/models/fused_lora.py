"""A LoRA's linear layer with fewer passes over its activations than peft's: y + s B (A x) in one matrix product.

peft casts x to the LoRA's float32 (which autocast then casts back), scales B A x, and adds it to y = W x + b, each of
which reads and writes as much as the layer's own input or output.
"""

import functools
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def fuse(unet: "torch.nn.Module") -> None:
    """Let peft's plain linear LoRA layers compute so; their weights, names and switches stay."""
    from peft.tuners.lora.layer import Linear

    for module in unet.modules():
        if type(module) is Linear:
            module.__class__ = _fused_linear()


@functools.cache
def _fused_linear() -> Any:
    import torch
    from peft.tuners.lora.layer import Linear
    from torch.nn import functional

    class FusedLinear(Linear):
        def forward(self, x: "Tensor") -> "Tensor":
            if self.disable_adapters or self.merged or self.lora_variant:
                return super().forward(x)
            result = self.base_layer(x)
            shape = result.shape
            for name in self.active_adapters:
                if name in self.lora_A:
                    # of more dimensions, torch computes otherwise where a weight requires a gradient, in the last bit
                    rows = self.lora_dropout[name](x).flatten(0, -2)
                    down, up = functional.linear(rows, self.lora_A[name].weight), self.lora_B[name].weight.T
                    result = torch.addmm(result.flatten(0, -2), down, up, alpha=self.scaling[name])
            return result.view(shape)

    return FusedLinear
