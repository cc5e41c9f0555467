"""What the UNet families share: LoRA or full fine-tuning of the UNet, from any start, against what it was at first."""

import contextlib
import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from diffusion_dpo.config import Config, ConfigError
from diffusion_dpo.console import warn
from diffusion_dpo.models import DiffusionModel, LoadedModel, fused_lora
from diffusion_dpo.models.base import read_base
from diffusion_dpo.models.base_facts import BaseFacts, require_side_px
from diffusion_dpo.models.checkpoint_file import find_checkpoint
from diffusion_dpo.models.lora_layers import (
    DEFAULT_TARGETS,
    add_to_weights,
    add_trained,
    keep_only,
    only,
    parts_of,
    peft_layers,
    put_on,
    read_back,
    train_only,
)
from diffusion_dpo.models.lora_write import LORA_FILE, write_lora
from diffusion_dpo.models.pipeline import POCKET_DIR, content_hash, facts, first_sentence, load_facts
from diffusion_dpo.models.requirements import require_trainable, with_schedule
from diffusion_dpo.models.start import Start, refuse_start
from diffusion_dpo.settings import PredictionType

if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline, UNet2DConditionModel
    from torch import Tensor

_TRAINED, _START = "default", "start"
"""The LoRA that is trained, and as it was at first, by peft's names; the latter is there where it began as another."""


class Lora(Config):
    """Low-rank adapters on the UNet (arXiv 2106.09685), through peft."""

    rank: int | None = Field(None, ge=1)
    """Rank of the update; null means 8, or those of the LoRA that training starts from, which are never lowered."""
    alpha: float | None = Field(None, gt=0)
    """The update is scaled by alpha / rank; null means alpha = rank."""
    targets: tuple[str, ...] | None = None
    """Name endings of the layers that get an adapter, linear layers and convolutions, beside those of the LoRA that
    training starts from; null means to_q, to_k, to_v and to_out.0, or those of that LoRA alone."""


class UNetDiffusion(DiffusionModel):
    """A diffusers pipeline with a UNet; each family is a subclass."""

    pipeline_name: ClassVar[str]
    """The pipeline of the family, by its name in diffusers."""

    pretrained: str
    """Local folder or hub id of a diffusers pipeline, or a single-file checkpoint (.safetensors)."""
    revision: str | None = None
    """Branch, tag or commit on the hub; pin it for results that can be repeated."""
    variant: str | None = None
    """Variant of the weight files, e.g. fp16."""
    prediction_type: PredictionType | None = None
    """What the model predicts, where its files do not say it or say it wrongly; null takes what they say."""
    adapter_path: Path | None = None
    """LoRA folder or file, `unet/` folder, or run folder that training starts from. The reference is the model with
    it; a LoRA is trained on, and what it has for the text encoders stays as it is."""
    lora: Lora | None = Lora()
    """LoRA settings; null fine-tunes the whole UNet."""

    def load_pipeline(self, device: "torch.device", dtype: "torch.dtype") -> "DiffusionPipeline":
        """Load the weights; raises ConfigError when they cannot be had or are of another family."""
        import torch

        if self.adapter_path is not None:
            refuse_start(self.adapter_path, whole_unet=self.lora is None)  # before gigabytes are loaded
        return load_facts(
            self.read_base(),
            revision=self.revision,
            device=device,
            dtype=dtype,
            # a UNet that is trained as a whole must not be rounded on the way in
            unet_dtype=torch.float32 if self.lora is None else dtype,
        )

    def read_base(self) -> BaseFacts:
        """Return the facts of the base; raises ConfigError where it is none that is trained as it draws."""
        base = read_base(
            self.pretrained, revision=self.revision, variant=self.variant, prediction_type=self.prediction_type
        )
        require_trainable(base, self.pipeline_name)
        return base

    def usage(self, adapter: str) -> str:
        """See DiffusionModel."""
        whole = Path(adapter).name == "unet"  # also of a LoRA that was trained on another whole UNet
        names = self.pipeline_name + (", UNet2DConditionModel" if whole else "")
        base = str(POCKET_DIR) if self.pretrained == "pocket" else self.pretrained
        base = str(find_checkpoint(base) or base)  # of a folder that holds one checkpoint, the file
        loader = "from_single_file" if base.endswith(".safetensors") else "from_pretrained"
        lines = [f"from diffusers import {names}\n", f"pipe = {self.pipeline_name}.{loader}({base!r})"]
        if self.prediction_type is not None:
            changed = f"pipe.scheduler.config, prediction_type={self.prediction_type!r}"
            lines.append(f"pipe.scheduler = pipe.scheduler.from_config({changed})")
        loading = f"pipe.load_lora_weights({adapter!r})"
        if whole:
            loading = f"pipe.unet = UNet2DConditionModel.from_pretrained({adapter!r})"
        return "\n".join([*lines, loading])


class LoadedUNet(LoadedModel):
    """The live model. Trained weights are float32 whatever `dtype`; policy and reference share one autocast."""

    def __init__(
        self, settings: UNetDiffusion, pipeline: "DiffusionPipeline", dtype: "torch.dtype", seed: int
    ) -> None:
        import torch
        from diffusers import DDPMScheduler

        assert settings.lora is not None or pipeline.unet.dtype == torch.float32
        start = Start.of(settings.adapter_path, pipeline)
        self.pipeline = pipeline
        self.unet = pipeline.unet
        self.device = pipeline.device
        self.dtype = dtype
        self.prediction_type: PredictionType = pipeline.scheduler.config.prediction_type
        self.scheduler = with_schedule(DDPMScheduler, pipeline.scheduler)
        self._alphas_cumprod = self.scheduler.alphas_cumprod.to(self.device, torch.float32)
        parts = pipeline.components
        encoders = [parts[name] for name in ("text_encoder", "text_encoder_2") if name in parts]
        vocabularies = [parts[name].get_vocab() for name in ("tokenizer", "tokenizer_2") if name in parts]
        for module in (pipeline.vae, *encoders, self.unet):
            module.requires_grad_(False).eval()
        self.base_hash = content_hash([facts(self.scheduler.config), *start.facts("unet")], self.unet)
        text = [
            *(facts(encoder.config.to_dict()) for encoder in encoders),
            *vocabularies,
            *start.facts("text_encoder"),
        ]
        self.encoder_hash = content_hash([facts(pipeline.vae.config), *text], pipeline.vae, *encoders)
        self._is_lora = settings.lora is not None
        self.reference_needs_copy = not self._is_lora
        self.original_lost = start.lost(is_lora=self._is_lora)
        self._start = replace(start, unet={})
        put_on(parts_of(pipeline), start.text_encoders, _START)
        if settings.lora is not None:
            add_lora(self.unet, settings.lora, start, seed)
        else:
            add_to_weights({"unet": self.unet}, {"unet": start.unet})
            self.unet.requires_grad_(True)
        self.unet.to(memory_format=torch.channels_last)  # what was added, too
        fused_lora.fuse(self.unet)
        self._lora_layers = list(peft_layers(self.unet).values())
        self._policy: torch.nn.Module | None = None
        self._copy: UNet2DConditionModel | None = None
        self._in_reference = self._compiled = False

    # --- encoding; prompts and sizes are each family's own ---

    def encode_images(self, images: "Tensor", noise: "Tensor") -> "Tensor":
        """See LoadedModel; in the precision of the VAE, which for SDXL's own is never float16."""
        import torch

        vae = self.pipeline.vae
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            posterior = vae.encode(images.to(self.device, vae.dtype)).latent_dist
            latents = posterior.mean.float() + posterior.std.float() * noise.to(self.device)
        return latents * float(vae.config.scaling_factor)

    @property
    def resolution_px(self) -> int:
        """See LoadedModel; raises ConfigError where the model does not say."""
        return require_side_px(self.unet.config.sample_size, self.downscale)

    @property
    def latent_channels(self) -> int:
        """See LoadedModel."""
        return int(self.unet.config.in_channels)

    @property
    def downscale(self) -> int:
        """See LoadedModel."""
        return int(self.pipeline.vae_scale_factor)

    # --- diffusion ---

    def sample_timesteps(self, uniform: "Tensor", num_timesteps: int | None = None) -> "Tensor":
        """Uniform over the training timesteps, or over the last one of each of `num_timesteps` equal parts of them.

        Of 1000, with num_timesteps = 4: 249, 499, 749, 999, where Turbo models were distilled (arXiv 2311.17042, and
        the code of Diffusion-DPO).
        """
        total = int(self.scheduler.config.num_train_timesteps)
        if num_timesteps is None:
            return (uniform * total).long()
        return ((uniform * num_timesteps).long() + 1) * total // num_timesteps - 1

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

        denoiser = self._copy if self._in_reference else self._policy
        if denoiser is None:
            denoiser = self.unet
        half = self.dtype != torch.float32
        # a weight is cast once a forward; the cache of such casts would outlive the blocks that are recomputed
        autocast = torch.autocast(self.device.type, self.dtype, enabled=half, cache_enabled=False)
        with autocast, self._compiler_errors():
            output = denoiser(
                noisy_latents.contiguous(memory_format=torch.channels_last),
                timesteps,
                **self.denoiser_inputs(conditioning),
            )
        return output.sample.float()

    def denoiser_inputs(self, conditioning: dict[str, "Tensor"]) -> "dict[str, Tensor | dict[str, Tensor]]":
        """Return the conditioning by the names that the UNet's forward has for it."""
        return {**conditioning}

    def _compiler_errors(self) -> AbstractContextManager[None]:
        return _compiler_errors() if self._compiled else contextlib.nullcontext()

    # --- policy and reference ---

    @contextmanager
    def reference(self) -> Iterator[None]:
        """The frozen copy; or else the start in the place of the trained LoRA; or else the UNet as it is."""
        import torch

        self._in_reference = True
        try:
            with torch.no_grad(), only(self._lora_layers, _START):
                yield
        finally:
            self._in_reference = False

    def original(self) -> AbstractContextManager[None] | None:
        """See LoadedModel: the LoRA that training starts from is left out as the trained one is."""
        return None if self._start.kind is None or self.original_lost else self._without_loras()

    @contextmanager
    def _without_loras(self) -> Iterator[None]:
        kept, self._copy = self._copy, None
        try:
            with self.reference(), only(self._lora_layers):
                yield
        finally:
            self._copy = kept

    def freeze_copy(self) -> None:
        """See LoadedModel. What is not trained is shared; of what is, as little is kept as the reference needs.

        Autocast rounds the weights of linear layers and convolutions to half precision, so that they can be stored
        so. Those of the norms it does not round.
        """
        import torch

        layers = (torch.nn.Linear, torch.nn.modules.conv._ConvNd)
        instead: dict[int, torch.nn.Parameter] = {}
        for module in self.unet.modules():
            for parameter in module.parameters(recurse=False):
                if parameter.requires_grad:
                    value = parameter.detach()
                    kept = value.to(self.dtype if isinstance(module, layers) else value.dtype, copy=True)
                    instead[id(parameter)] = torch.nn.Parameter(kept, requires_grad=False)
                else:
                    instead[id(parameter)] = parameter
        self._copy = copy.deepcopy(self.unet, instead)
        if self._is_lora:
            keep_only(self._copy, _START)

    def wrap_policy(self, wrap: "Callable[[torch.nn.Module], torch.nn.Module]") -> None:
        """See LoadedModel."""
        self._policy = wrap(self.unet)

    def compile(self) -> None:
        """See LoadedModel. Each width is compiled with and without gradients, and once more when the shape changes."""
        import torch._dynamo

        # at the default, 8, whatever comes after the first shape would not be compiled at all
        torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
        # with a LoRA and without, other steps are fused: rounded in between as ever, they begin as one in bf16 too
        options = {"emulate_precision_casts": True}
        self.unet.compile_repeated_blocks(options=options)
        if self._copy is not None:
            self._copy.compile_repeated_blocks(options=options)
        self._compiled = True

    # --- training and saving ---

    def trainable(self) -> dict[str, "torch.nn.Parameter"]:
        """See LoadedModel."""
        return {name: parameter for name, parameter in self.unet.named_parameters() if parameter.requires_grad}

    def enable_gradient_checkpointing(self, *, selective: bool) -> None:
        """See LoadedModel."""
        checkpoint_blocks(self.unet, selective=selective)

    def save(self, run_dir: Path) -> Path:
        """Write `adapter/`, for `pipe.load_lora_weights`, or the whole `unet/`, where that is trained or started from.

        A LoRA that training started from is in the adapter too, with its part for the text encoders, so that the
        pretrained model needs nothing else. Equal weights give equal bytes.
        """
        import torch

        if not self._is_lora or self._start.kind == "unet":
            whole = self.unet
            if self._is_lora:
                whole = copy.deepcopy(self.unet)
                whole.fuse_lora()
                whole.unload_lora()
            whole.save_pretrained(run_dir / "unet")
            return run_dir / "unet"
        layers = {**read_back({"unet": self.unet}, _TRAINED), **self._start.text_encoders}
        (run_dir / "adapter").mkdir(parents=True, exist_ok=True)
        write_lora(run_dir / "adapter" / LORA_FILE, layers, torch.float32)
        return run_dir / "adapter"


def add_lora(unet: "UNet2DConditionModel", lora: Lora, start: Start, seed: int) -> None:
    """Put on what is trained and, where that begins as something, the same again, frozen, for the reference.

    Raises ConfigError when the targets fit no layer.
    """
    try:
        add_trained(
            unet, _TRAINED, rank=lora.rank, alpha=lora.alpha, targets=lora.targets, start=start.unet, seed=seed
        )
    except ValueError as error:
        raise ConfigError(
            f"model.lora.targets {list(lora.targets or DEFAULT_TARGETS)} fit no layer of the UNet: {error}"
        ) from None
    if start.unet:
        if lora.rank and (higher := max(layer.rank for layer in start.unet.values())) > lora.rank:
            warn(f"model.lora.rank={lora.rank}, and the LoRA that training starts from keeps its rank, {higher}")
        policy = read_back({"unet": unet}, _TRAINED)["unet"]
        put_on({"unet": unet}, {"unet": {path: policy[path] for path in start.unet}}, _START)
    train_only(unet, _TRAINED)


def checkpoint_blocks(unet: "UNet2DConditionModel", *, selective: bool) -> None:
    """Let blocks of a UNet be recomputed in the backward pass: all, or the outer ones.

    The outer ones go down to the first resolution with attention. Counted for a pair in bfloat16, all weights trained:
    in SD 1.5 at 512 px they hold 26 % of the bytes that are kept for the backward pass and cost 7 % more FLOPs (all
    blocks: 85 %, 23 %), in SDXL at 1024 px 23 % and 7 % (93 %, 25 %). SDXL's blocks of the highest resolution alone,
    without attention, hold 4 %.
    """
    unet.enable_gradient_checkpointing()
    if not selective:
        return
    with_attention = [any(name == "attentions" for name, _ in block.named_children()) for block in unet.down_blocks]
    num_outer = with_attention.index(True) + 1
    for block in (*unet.down_blocks[num_outer:], unet.mid_block, *unet.up_blocks[:-num_outer]):
        for module in block.modules():
            if getattr(module, "gradient_checkpointing", False):
                module.gradient_checkpointing = False


@contextmanager
def _compiler_errors() -> Iterator[None]:
    """Say in one sentence what torch.compile, which works when a block first runs, cannot do."""
    from torch._dynamo.exc import TorchDynamoException

    try:
        yield
    except TorchDynamoException as error:
        raise ConfigError(
            f"compile=true, and torch.compile failed: {first_sentence(error)}. Set compile=false; `diffusion-dpo "
            "doctor` shows the versions here"
        ) from error
