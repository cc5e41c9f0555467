"""A model without its weights: built from its settings alone, run on fake tensors, to count what real ones would hold.

Nothing is downloaded but settings, nothing is computed, and no device is needed: a step of SDXL takes seconds.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from diffusion_dpo.config import ConfigError
from diffusion_dpo.models.adapters import find_adapter
from diffusion_dpo.models.base_facts import BaseFacts, require_side_px
from diffusion_dpo.models.lora_file import PARTS
from diffusion_dpo.models.quiet import quiet
from diffusion_dpo.models.start import Start, refuse_start
from diffusion_dpo.models.unet_diffusion import add_lora, checkpoint_blocks
from diffusion_dpo.settings import TrainConfig

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class NoEstimateError(ConfigError):
    """There is nothing wrong with the settings, but the model is of no family that is known here."""


@dataclass(frozen=True)
class StepBytes:
    """What one forward and backward of a micro-batch holds, beyond what is there before it, in bytes."""

    saved: int
    """After the forward: what the backward will need."""
    peak: int
    """At most; the gradients included, unless they were there before."""


@dataclass(frozen=True)
class Skeleton:
    """The parts of a pipeline as `train` loads them, on the meta device: shapes and dtypes, no numbers."""

    unet: Any
    """With its LoRA; `requires_grad` is true of what is trained."""
    vae: Any
    text_encoders: list[Any]
    num_tokens: int
    downscale: int
    """Pixels per latent element along one side."""
    resolution_px: int
    dtype: "torch.dtype"
    """Of the autocast and of the frozen parts."""
    on_cuda: bool

    def trained(self) -> "list[Tensor]":
        """Return the trained weights."""
        return [parameter for parameter in self.unet.parameters() if parameter.requires_grad]

    def step(self, num_images: int, *, checkpointing: bool | str, accumulates: bool) -> StepBytes:
        """Run a forward and a backward on fake tensors; `accumulates`: gradients are there from a micro-batch before.

        The reference's forward, which keeps nothing, is never the peak.
        """
        import torch

        from diffusion_dpo.training.live_bytes import LiveBytes

        with self._faked(self.unet) as unet:
            if checkpointing:
                checkpoint_blocks(unet, selective=checkpointing == "selective")
            parameters = [parameter for parameter in unet.parameters() if parameter.requires_grad]
            if accumulates:
                for parameter in parameters:
                    parameter.grad = torch.empty_like(parameter)
            grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
            inputs = self._inputs(num_images, self.resolution_px)
            with LiveBytes([*unet.parameters(), *grads]) as counted:
                prediction = self._predict(unet, inputs)
                loss = (prediction - inputs["sample"]).square().mean()
                saved = counted.live
                loss.backward()
            return StepBytes(saved, counted.peak)

    def denoising(self, num_images: int, side_px: int) -> int:
        """Return the peak of bytes of a forward without gradient, as when drawing and evaluating."""
        import torch

        from diffusion_dpo.training.live_bytes import LiveBytes

        with self._faked(self.unet) as unet, LiveBytes(unet.parameters()) as counted, torch.no_grad():
            self._predict(unet, self._inputs(num_images, side_px))
        return counted.peak

    def encoding(self, num_images: int, side_px: int) -> int:
        """Return the peak of bytes while the VAE encodes images."""
        return self._vae_peak("encode", (num_images, 3, side_px, side_px))

    def decoding(self, num_images: int, side_px: int) -> int:
        """Return the peak of bytes while the VAE decodes latents."""
        side = side_px // self.downscale
        return self._vae_peak("decode", (num_images, self.vae.config.latent_channels, side, side))

    def _vae_peak(self, method: str, shape: tuple[int, ...]) -> int:
        import torch

        from diffusion_dpo.training.live_bytes import LiveBytes

        with self._faked(self.vae) as vae, LiveBytes(vae.parameters()) as counted, torch.no_grad():
            getattr(vae, method)(torch.empty(shape, dtype=vae.dtype))
        return counted.peak

    def _inputs(self, num_images: int, side_px: int) -> "dict[str, Any]":
        import torch

        config, side = self.unet.config, side_px // self.downscale
        sample = torch.empty(num_images, config.in_channels, side, side)
        inputs: dict[str, Any] = {
            "sample": sample.contiguous(memory_format=torch.channels_last),
            "timestep": torch.empty(num_images, dtype=torch.int64),
            "encoder_hidden_states": torch.empty(num_images, self.num_tokens, config.cross_attention_dim),
        }
        if config.addition_embed_type == "text_time":  # SDXL: six numbers of size and crop beside the pooled text
            width = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
            inputs["added_cond_kwargs"] = {
                "text_embeds": torch.empty(num_images, width),
                "time_ids": torch.empty(num_images, 6),
            }
        return inputs

    def _predict(self, unet: Any, inputs: dict[str, Any]) -> "Tensor":
        import torch

        with torch.autocast("cpu", torch.bfloat16, enabled=self.dtype != torch.float32, cache_enabled=False):
            prediction: Tensor = unet(**inputs).sample
        return prediction.float()

    @contextmanager
    def _faked(self, module: Any) -> Iterator[Any]:
        """A copy of a module with fake tensors on the CPU for weights, in the mode in which they can be computed with.

        For CUDA the norms of the UNet take float32, as autocast on CUDA has it
        (https://docs.pytorch.org/docs/stable/amp.html), and contiguous images; the CPU does neither. Fake tensors of
        CUDA itself have no backward where there is no such device. The VAE runs without autocast.
        """
        import copy

        import torch
        from torch._subclasses.fake_tensor import FakeTensorMode

        upcasts = self.on_cuda and module is self.unet and self.dtype != torch.float32
        module = copy.deepcopy(module)
        with FakeTensorMode():
            for part in module.modules():
                is_upcast = upcasts and isinstance(part, torch.nn.GroupNorm | torch.nn.LayerNorm)
                for name, value in [*part._parameters.items(), *part._buffers.items()]:
                    if value is None:
                        continue
                    dtype = torch.float32 if is_upcast else value.dtype
                    fake = torch.empty_strided(value.shape, value.stride(), dtype=dtype)
                    if name in part._parameters:
                        part._parameters[name] = torch.nn.Parameter(fake, requires_grad=value.requires_grad)
                    else:
                        part._buffers[name] = fake
                if is_upcast:
                    part.register_forward_pre_hook(lambda _, inputs: (inputs[0].float().contiguous(),))
            yield module


def read_skeleton(config: TrainConfig, dtype: "torch.dtype", *, on_cuda: bool) -> Skeleton:
    """Read a model's settings, and build it without weights, with what is trained.

    Raises ConfigError when the settings cannot be had, NoEstimateError when the model is of a family not known here.
    """
    import torch
    from diffusers import UNet2DConditionModel

    model: Any = config.model
    if getattr(model, "type", None) not in ("stable_diffusion", "stable_diffusion_xl"):
        raise NoEstimateError(f"there is no memory estimate for model.type={model.type}")
    base: BaseFacts = model.read_base()
    unet_config, kind = base.unet, None
    if model.adapter_path is not None:
        refuse_start(model.adapter_path, whole_unet=model.lora is None)
        kind, where = find_adapter(model.adapter_path)
    if kind == "unet":
        unet_config = UNet2DConditionModel.load_config(where)
    whole = model.lora is None or kind == "unet"  # these are float32 from the beginning
    unet = _build_unet(unet_config, torch.float32 if whole else dtype)
    texts = [_build_text_encoder(base.text_classes[name], text, dtype) for name, text in base.texts.items()]
    start = Start()
    if kind == "lora":
        start = Start.of_lora(where, dict(zip(PARTS, [unet, *texts], strict=False)))
    if model.lora is None:
        unet.requires_grad_(True)
    else:
        add_lora(unet, model.lora, start, seed=0)
    unet.to(memory_format=torch.channels_last)
    upcast = base.is_xl and base.vae["force_upcast"] and dtype == torch.float16
    vae = _build_vae(base.vae, torch.float32 if upcast else dtype)
    downscale = base.downscale
    side = config.resolution_px or require_side_px(base.unet["sample_size"], downscale)
    if side % downscale:
        raise ConfigError(f"resolution_px is {side}; this model needs a multiple of {downscale}")
    return Skeleton(
        unet=unet,
        vae=vae,
        text_encoders=texts,
        num_tokens=texts[0].config.max_position_embeddings,
        downscale=downscale,
        resolution_px=side,
        dtype=dtype,
        on_cuda=on_cuda,
    )


def _build_unet(config: Mapping[str, Any], dtype: "torch.dtype") -> Any:
    import torch
    from diffusers import UNet2DConditionModel

    with torch.device("meta"), quiet():  # it warns of every cast, whether or not a part is to stay in float32
        return UNet2DConditionModel.from_config(config).to(dtype).eval().requires_grad_(False)


def _build_vae(config: Mapping[str, Any], dtype: "torch.dtype") -> Any:
    import torch
    from diffusers import AutoencoderKL

    with torch.device("meta"), quiet():
        vae = AutoencoderKL.from_config(config).to(dtype).eval()
    return vae.to(memory_format=torch.channels_last)


def _build_text_encoder(class_name: str, config: Mapping[str, Any], dtype: "torch.dtype") -> Any:
    import torch
    import transformers

    with torch.device("meta"):
        return getattr(transformers, class_name)(transformers.CLIPTextConfig.from_dict(dict(config))).to(dtype)
