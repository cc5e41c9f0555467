"""Stable Diffusion 1.x and 2.x, whatever they predict: LoRA or full fine-tuning of the UNet, from any start."""

import copy
import hashlib
import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from pydantic import Field

from diffusion_dpo.config import Config, ConfigError
from diffusion_dpo.models import DiffusionModel, LoadedModel, adapters
from diffusion_dpo.models.pipeline import POCKET_DIR, load_base
from diffusion_dpo.settings import PredictionType

if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline, StableDiffusionPipeline
    from torch import Tensor

_TRAINED, _START = "default", "start"
"""The LoRA that is trained, and the one that it may start from, by peft's names."""


class Lora(Config):
    """Low-rank adapters on the UNet (arXiv 2106.09685), through peft."""

    rank: int = Field(8, ge=1)
    """Rank of the update."""
    alpha: float | None = Field(None, gt=0)
    """The update is scaled by alpha / rank; null means alpha = rank."""
    targets: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")
    """Name endings of the layers that get an adapter; linear layers and convolutions."""


class StableDiffusion(DiffusionModel):
    """A Stable Diffusion 1.x / 2.x pipeline."""

    pretrained: str = "pocket"
    """Local folder or hub id of a diffusers pipeline; `pocket` is the small model that comes with the package."""
    revision: str | None = None
    """Branch, tag or commit on the hub; pin it for results that can be repeated."""
    variant: str | None = None
    """Variant of the weight files, e.g. fp16."""
    adapter_path: Path | None = None
    """LoRA folder or file, `unet/` folder, or run folder that training starts from; it is part of the reference."""
    lora: Lora | None = Lora()
    """LoRA settings; null fine-tunes the whole UNet against a frozen copy of itself."""

    def load(self, *, device: "torch.device", dtype: "torch.dtype", seed: int) -> "LoadedStableDiffusion":
        """Load the weights and add what is trained; `dtype` is that of the frozen parts and of the autocast."""
        import torch

        if self.adapter_path is not None:
            adapters.find_adapter(self.adapter_path)  # before gigabytes are loaded
        # a UNet that is trained as a whole must not be rounded on the way in
        dtypes = {"default": dtype, "unet": torch.float32 if self.lora is None else dtype}
        pipeline = load_base(
            self.pretrained, revision=self.revision, variant=self.variant, device=device, dtype=dtypes
        )
        _require_stable_diffusion(self.pretrained, pipeline)
        return LoadedStableDiffusion(self, pipeline, dtype, seed)

    def usage(self, adapter: str) -> str:
        """See DiffusionModel."""
        whole = Path(adapter).name == "unet"  # also of a LoRA that was trained on another whole UNet
        names = "StableDiffusionPipeline" + (", UNet2DConditionModel" if whole else "")
        base = str(POCKET_DIR) if self.pretrained == "pocket" else self.pretrained
        loading = f"pipe.load_lora_weights({adapter!r})"
        if whole:
            loading = f"pipe.unet = UNet2DConditionModel.from_pretrained({adapter!r})"
        return f"from diffusers import {names}\n\npipe = StableDiffusionPipeline.from_pretrained({base!r})\n{loading}"


def _require_stable_diffusion(name: str, pipeline: "DiffusionPipeline") -> None:
    """Raise ConfigError for models that look alike but are fed otherwise (SDXL, inpainting, video)."""
    from diffusers import StableDiffusionPipeline

    if type(pipeline) is not StableDiffusionPipeline:
        raise ConfigError(
            f"{name} is a {type(pipeline).__name__}; model.type stable_diffusion needs Stable Diffusion 1.x or 2.x"
        )
    channels, latents = pipeline.unet.config.in_channels, pipeline.vae.config.latent_channels
    if channels != latents:
        raise ConfigError(
            f"the UNet of {name} takes {channels} channels, not {latents}: an inpainting or editing model?"
        )


class LoadedStableDiffusion(LoadedModel):
    """The live model. Trained weights are float32 whatever `dtype`; policy and reference share one autocast."""

    def __init__(
        self, settings: StableDiffusion, pipeline: "StableDiffusionPipeline", dtype: "torch.dtype", seed: int
    ) -> None:
        import torch
        from diffusers import DDPMScheduler

        assert settings.lora is not None or pipeline.unet.dtype == torch.float32
        self._start = None
        if settings.adapter_path is not None:
            self._start = adapters.add_adapter(pipeline, settings.adapter_path, name=_START, unet_only=True)
        self.pipeline = pipeline
        self.unet = pipeline.unet
        self.device = pipeline.device
        self.dtype = dtype
        self.resolution_px = self.unet.config.sample_size * pipeline.vae_scale_factor
        self.prediction_type = _prediction_type(settings.pretrained, pipeline)
        self.scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
        self._alphas_cumprod = self.scheduler.alphas_cumprod.to(self.device, torch.float32)
        for module in (pipeline.vae, pipeline.text_encoder, self.unet):
            module.requires_grad_(False).eval()
        self.base_hash = _hash([_facts(self.scheduler.config), *_start_scales(self.unet)], self.unet)
        text = [_facts(pipeline.text_encoder.config.to_dict()), pipeline.tokenizer.get_vocab()]
        self.encoder_hash = _hash([_facts(pipeline.vae.config), *text], pipeline.vae, pipeline.text_encoder)
        self._frozen_unet = None
        if settings.lora is None:
            if self._start == "lora":
                adapters.merge(self.unet)
            self.unet.requires_grad_(True)
        else:
            self._add_lora(settings.lora, seed)
        self._lora_layers = list(adapters.lora_layers(self.unet).values())
        self.reference_needs_copy = self._full = settings.lora is None
        self._policy = self.unet

    def freeze_copy(self):
        frozen = copy.deepcopy(self.unet)
        self._frozen_unet = frozen.requires_grad_(False)

    def wrap_policy(self, wrap):
        self._policy = wrap(self.unet)

    def _add_lora(self, lora: Lora, seed: int) -> None:
        import torch
        from peft import LoraConfig

        config = LoraConfig(
            r=lora.rank,
            lora_alpha=lora.rank if lora.alpha is None else lora.alpha,
            init_lora_weights="gaussian",
            target_modules=list(lora.targets),
        )
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Already found a `peft_config`")  # the start: it is meant to be there
            torch.manual_seed(seed)
            try:
                self.unet.add_adapter(config, adapter_name=_TRAINED)
            except ValueError as error:
                raise ConfigError(
                    f"model.lora.targets {list(lora.targets)} fit no layer of the UNet: {error}"
                ) from None
        adapters.train_only(self.unet, _TRAINED, beside=[_START] if self._start == "lora" else [])

    # --- encoding ---

    def encode_images(self, images: "Tensor", noise: "Tensor") -> "Tensor":
        """See LoadedModel."""
        import torch

        vae = self.pipeline.vae
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            posterior = vae.encode(images.to(self.device, vae.dtype)).latent_dist
            latents = posterior.mean.float() + posterior.std.float() * noise.to(self.device)
        return latents * float(vae.config.scaling_factor)

    def encode_prompts(self, prompts: Sequence[str]) -> dict[str, "Tensor"]:
        """See LoadedModel; the one entry is `encoder_hidden_states`, (B, tokens, width)."""
        import torch

        with torch.no_grad():
            embeds, _ = self.pipeline.encode_prompt(list(prompts), self.device, 1, do_classifier_free_guidance=False)
        return {"encoder_hidden_states": embeds.float()}

    @property
    def latent_channels(self) -> int:
        """See LoadedModel."""
        return int(self.unet.config.in_channels)

    @property
    def downscale(self) -> int:
        """See LoadedModel."""
        return int(self.pipeline.vae_scale_factor)

    # --- diffusion ---

    def sample_timesteps(self, uniform: "Tensor") -> "Tensor":
        """Uniform over the training timesteps."""
        return (uniform * self.scheduler.config.num_train_timesteps).long()

    def log_snr(self, timesteps: "Tensor") -> "Tensor":
        """See LoadedModel."""
        alpha_squared = self._alphas_cumprod[timesteps]
        return (alpha_squared / (1 - alpha_squared)).log()

    def add_noise(self, latents: "Tensor", noise: "Tensor", timesteps: "Tensor") -> "Tensor":
        """x_t = alpha_t x_0 + sigma_t epsilon."""
        return self.scheduler.add_noise(latents, noise, timesteps)

    def target(self, latents: "Tensor", noise: "Tensor", timesteps: "Tensor") -> "Tensor":
        """Epsilon, x_0, or v = alpha_t epsilon - sigma_t x_0 (arXiv 2202.00512)."""
        if self.prediction_type == "epsilon":
            return noise
        if self.prediction_type == "sample":
            return latents
        return self.scheduler.get_velocity(latents, noise, timesteps)

    def predict(self, noisy_latents: "Tensor", timesteps: "Tensor", conditioning: dict[str, "Tensor"]) -> "Tensor":
        """See LoadedModel; float32 out."""
        import torch

        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            output = self._policy(
                noisy_latents.contiguous(memory_format=torch.channels_last), timesteps, **conditioning
            )
        return output.sample.float()

    @contextmanager
    def reference(self) -> Iterator[None]:
        """The trained LoRA left out, or the frozen copy in the place of the trained UNet."""
        import torch

        with torch.no_grad():
            if self._frozen_unet is None and self._full:
                yield
            elif self._frozen_unet is None:
                with adapters.left_out(self._lora_layers, _TRAINED):
                    yield
            else:
                policy, self._policy = self._policy, self._frozen_unet
                try:
                    yield
                finally:
                    self._policy = policy

    # --- training and saving ---

    def trainable(self) -> dict[str, "torch.nn.Parameter"]:
        """See LoadedModel."""
        return {name: parameter for name, parameter in self.unet.named_parameters() if parameter.requires_grad}

    def enable_gradient_checkpointing(self) -> None:
        """See LoadedModel."""
        self.unet.enable_gradient_checkpointing()

    def save(self, run_dir: Path) -> Path:
        """Write `adapter/`, for `pipe.load_lora_weights`, or the whole `unet/`, where that is trained or started from.

        A LoRA that training started from is in the adapter too, so that the pretrained model needs nothing else.
        """
        if self._full or self._start == "unet":
            whole = self.unet
            if not self._full:
                whole = copy.deepcopy(self.unet)
                adapters.merge(whole)
            whole.save_pretrained(run_dir / "unet")
            return run_dir / "unet"
        weights, config = adapters.one_lora(self.unet)
        # by peft's names: in diffusers' own, which exist for attention only, it would lose the layers of other kinds
        self.pipeline.save_lora_weights(
            run_dir / "adapter", unet_lora_layers=weights, unet_lora_adapter_metadata=config
        )
        return run_dir / "adapter"


def _prediction_type(name: str, pipeline: "DiffusionPipeline") -> PredictionType:
    prediction: PredictionType = pipeline.scheduler.config.prediction_type
    if prediction not in get_args(PredictionType):
        raise ConfigError(f"{name} predicts {prediction!r}; one of {', '.join(get_args(PredictionType))} is needed")
    return prediction


def _start_scales(unet: "torch.nn.Module") -> list[dict[str, float]]:
    """How strongly the LoRA that training starts from acts on each layer; nothing without one."""
    layers = adapters.lora_layers(unet)
    return [{name: layer.scaling[_START] for name, layer in layers.items()}] if layers else []


def _facts(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a part without where it came from and which version read it."""
    return {key: value for key, value in config.items() if not key.startswith("_") and key != "transformers_version"}


def _hash(facts: object, *modules: "torch.nn.Module") -> str:
    """Hash settings and the weights themselves: an edited model in the same folder is another model."""
    import torch

    digest = hashlib.blake2b(json.dumps(facts, sort_keys=True, default=str).encode(), digest_size=16)
    for module in modules:
        for name, tensor in module.state_dict().items():
            digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
            digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
