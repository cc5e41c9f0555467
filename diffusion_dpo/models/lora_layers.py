"""LoRAs on a live model: beside its weights, through peft, or added into them by the arithmetic of the file alone."""

import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from diffusion_dpo.models.lora_file import PARTS, Layers, LoraLayer

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel
    from peft.tuners.lora import LoraLayer as PeftLayer
    from torch import Tensor, nn

DEFAULT_RANK, DEFAULT_TARGETS = 8, ("to_q", "to_k", "to_v", "to_out.0")
"""Of a fresh LoRA: on the attention alone."""


def parts_of(pipeline: Any) -> "dict[str, nn.Module]":
    """Return the parts of a pipeline that can carry a LoRA."""
    return {part: pipeline.components[part] for part in PARTS if pipeline.components.get(part) is not None}


def peft_layers(model: "nn.Module") -> "dict[str, PeftLayer]":
    """Return the layers that carry LoRAs, by name, in the order of the model."""
    from peft.tuners.lora import LoraLayer

    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}


def put_on(models: "Mapping[str, nn.Module]", layers: Layers, name: str, *, scale: float = 1.0) -> None:
    """Put a LoRA beside the weights of a pipeline's parts, frozen, in float32, `scale` times as strong.

    Added into half-precision weights, most of a small update would be rounded away.
    """
    import torch
    from peft import LoraConfig

    for part, of_part in layers.items():
        model: Any = models[part]
        config = LoraConfig(
            r=1,
            target_modules=list(of_part),
            use_dora=any(layer.magnitude is not None for layer in of_part.values()),
            lora_bias=any(layer.bias is not None for layer in of_part.values()),
        )
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():  # what peft begins with is replaced
            warnings.filterwarnings("ignore", "Already found a `peft_config`")  # of the one that is trained
            model.add_adapter(config, adapter_name=name)
        places = peft_layers(model)
        for path, layer in of_part.items():
            fill(places[path], name, layer, scale=scale)
        model.eval()


def fill(place: Any, name: str, layer: LoraLayer, *, scale: float = 1.0, trained: bool = False) -> None:
    """Let the LoRA `name` of a layer of peft be this one, whatever its rank, in float32."""
    import torch

    def parameter(value: "Tensor") -> "nn.Parameter":
        device = place.get_base_layer().weight.device
        return torch.nn.Parameter(value.detach().to(device, torch.float32, copy=True), requires_grad=trained)

    place.lora_A[name].weight = parameter(layer.down)
    place.lora_B[name].weight = parameter(layer.up)
    place.r[name], place.lora_alpha[name] = layer.rank, layer.alpha
    place.scaling[name] = layer.scale * scale
    if place.lora_B[name].bias is not None:
        place.lora_B[name].bias = parameter(torch.zeros(len(layer.up)) if layer.bias is None else layer.bias)
    if layer.magnitude is not None:
        place.lora_magnitude_vector[name].weight = parameter(layer.magnitude)


def read_back(models: "Mapping[str, nn.Module]", name: str) -> dict[str, dict[str, LoraLayer]]:
    """Return the layers of the LoRA `name` that lies on a pipeline's parts, at the strength that is set."""
    found = {}
    for part, model in models.items():
        layers = {path: _read(place, name) for path, place in peft_layers(model).items() if name in place.lora_A}
        if layers:
            found[part] = layers
    return found


def _read(place: Any, name: str) -> LoraLayer:
    down, up = place.lora_A[name].weight.detach(), place.lora_B[name]
    has_magnitude = name in place.lora_magnitude_vector
    return LoraLayer(
        down=down,
        up=up.weight.detach(),
        alpha=float(place.scaling[name] * len(down)),
        magnitude=place.lora_magnitude_vector[name].weight.detach() if has_magnitude else None,
        bias=None if up.bias is None else up.bias.detach(),
    )


def add_to_weights(models: "Mapping[str, nn.Module]", layers: Layers, *, scale: float = 1.0) -> None:
    """Add a LoRA into the weights of a pipeline's parts, which have none beside them.

    W + s B A; of a DoRA (arXiv 2402.09353, equation 5) m (W + s B A) / |W + s B A|, with the norm of each row.
    """
    import torch

    for part, of_part in layers.items():
        for path, layer in of_part.items():
            module: Any = models[part].get_submodule(path)
            weight = module.weight
            with torch.no_grad():
                changed = weight.float() + scale * layer.delta().to(weight.device)
                if layer.magnitude is not None:
                    norms = changed.flatten(1).norm(dim=1)
                    rows = layer.magnitude.flatten().to(weight.device) / norms
                    changed = rows.view(-1, *[1] * (changed.ndim - 1)) * changed
                weight.copy_(changed)
                if layer.bias is not None:
                    bias = scale * layer.scale * layer.bias.to(weight.device, weight.dtype)
                    module.bias = torch.nn.Parameter(bias if module.bias is None else module.bias + bias)


@contextmanager
def added(models: "Mapping[str, nn.Module]", layers: Layers) -> Iterator[None]:
    """Within it, a LoRA is in the weights of a pipeline's parts; afterwards they are bit for bit as before."""
    places: list[Any] = [models[part].get_submodule(path) for part, of_part in layers.items() for path in of_part]
    kept = [(place.weight.detach().clone(), place.bias) for place in places]
    try:
        add_to_weights(models, layers)
        yield
    finally:
        for place, (weight, bias) in zip(places, kept, strict=True):
            place.weight.data.copy_(weight)
            place.bias = bias


@contextmanager
def only(layers: "Sequence[PeftLayer]", *names: str) -> Iterator[None]:
    """Within it, the layers compute with these LoRAs alone.

    peft's own switches (set_adapter, disable_adapters) also change which weights require a gradient.
    """
    active = [layer.active_adapter for layer in layers]
    try:
        for layer in layers:
            layer._active_adapter = list(names)
        yield
    finally:
        for layer, before in zip(layers, active, strict=True):
            layer._active_adapter = before


def keep_only(unet: "UNet2DConditionModel", name: str) -> None:
    """Take all LoRAs but `name` off a UNet, which goes by it, frozen; without that one it is a plain UNet again."""
    names = list(unet.peft_config)
    if name not in names:
        unet.unload_lora()
        return
    unet.set_adapters([name])
    unet.delete_adapters([other for other in names if other != name])
    unet.requires_grad_(False)


def train_only(unet: "UNet2DConditionModel", name: str) -> None:
    """Let the UNet go by the LoRA `name` alone, and only that be trained, in float32."""
    import torch
    from diffusers.training_utils import cast_training_params

    unet.set_adapters([name])
    for parameter_name, parameter in unet.named_parameters():
        parameter.requires_grad_(f".{name}." in parameter_name)
    cast_training_params(unet, dtype=torch.float32)


def add_trained(
    unet: "UNet2DConditionModel",
    name: str,
    *,
    rank: int | None,
    alpha: float | None,
    targets: Sequence[str] | None,
    start: Mapping[str, LoraLayer],
    seed: int,
) -> None:
    """Put the LoRA that is trained on a UNet: a fresh one, or one that begins as `start` and computes the same.

    Of a start, each layer keeps its rank, or gets `rank` where that is higher: the new rows of A are random and the
    new columns of B zero. Its strength goes into B, so that what is trained is scaled by alpha / rank as ever. Layers
    of `targets` that the start lacks begin as fresh ones do. Raises ValueError when no layer has one of the names.
    """
    import torch
    from peft import LoraConfig

    ranks = Counter(layer.rank for layer in start.values())
    common = rank or (ranks.most_common(1)[0][0] if ranks else DEFAULT_RANK)
    config = LoraConfig(
        r=common,
        lora_alpha=common if alpha is None else alpha,
        init_lora_weights="gaussian",
        target_modules=[*start, *(targets or (() if start else DEFAULT_TARGETS))],
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet.add_adapter(config, adapter_name=name)
    for path, place in peft_layers(unet).items():
        if path in start:
            fresh: Tensor = place.lora_A[name].weight.detach()
            fill(place, name, _grown(start[path], fresh, rank=rank or 0, alpha=alpha), trained=True)


def _grown(layer: LoraLayer, fresh: "Tensor", *, rank: int, alpha: float | None) -> LoraLayer:
    """Return a layer that computes the same, with at least `rank`, and with this alpha (None: the rank)."""
    import torch

    num_new = max(0, rank - layer.rank)
    rank = layer.rank + num_new
    alpha = float(rank) if alpha is None else alpha
    up = layer.up.to(fresh.device) * (layer.scale * rank / alpha)
    down = torch.cat([layer.down.to(fresh.device), fresh[:num_new]])
    return LoraLayer(down, torch.cat([up, up.new_zeros(len(up), num_new, *up.shape[2:])], dim=1), alpha)
