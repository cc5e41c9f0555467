"""The settings of `train`."""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from diffusion_dpo.config import Config, plugin
from diffusion_dpo.settings.common import Device, Precision, Sampling


class Preview(Config):
    """Images drawn while training: fixed prompts, fixed seeds, step 0 included."""

    prompts: tuple[str, ...] = ()
    """Prompts to draw; empty takes the first four of the data."""
    every_steps: int | None = Field(None, ge=1)
    """Draw every so many steps; null draws at the start and at the end."""
    sampling: Sampling = Sampling(batch_size=4)
    """How they are drawn."""


class Weighting(Config):
    """Which noise levels count, and in which space an error is measured."""

    timesteps: Literal["constant", "min_snr", "elbo", "inv_alpha_sigma"] = "constant"
    """constant: as published. min_snr: min(SNR, gamma) on the error of x_0 (2303.09556). elbo: that of the evidence
    bound. inv_alpha_sigma: 1 / (alpha^2 sigma^2) on the error of epsilon, under which beta is the same pull at every
    noise level."""
    min_snr_gamma: float = Field(5.0, gt=0)
    """gamma of min_snr."""
    error_space: Literal["native", "epsilon", "x0"] = "native"
    """Where errors are measured with constant weights: where the model predicts, or converted to epsilon or x_0."""
    timestep_range: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(gt=0, le=1)]] = (0.0, 1.0)
    """Part of the noise schedule that timesteps are drawn from; 0 is the image, 1 is noise."""
    num_timesteps: int | None = Field(None, ge=1)
    """Draw only from so many evenly spaced timesteps, pure noise among them: those that a distilled model (Turbo) was
    made for, usually 4; null draws from all."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.timesteps != "constant" and self.error_space != "native":
            raise ValueError(
                f"timesteps={self.timesteps} says itself in which space errors count; leave error_space at native"
            )
        if self.num_timesteps is not None and self.timestep_range != (0.0, 1.0):
            raise ValueError("num_timesteps names its timesteps itself; leave timestep_range at [0.0, 1.0]")
        low, high = self.timestep_range
        if low >= high:
            raise ValueError(f"timestep_range must rise, not go from {low:g} to {high:g}")
        return self


class Regularizers(Config):
    """Terms that are added to the objective, each with its weight; 0 leaves it out."""

    sft: float = Field(0.0, ge=0)
    """On the chosen image's error: keeps what was liked likely. DPO itself pulls on it with at first beta / 4."""
    chosen_hinge: float = Field(0.0, ge=0)
    """On how far the chosen image's error is above the reference's."""
    drift: float = Field(0.0, ge=0)
    """On the mean squared distance between the predictions of policy and reference."""

    @property
    def needs_reference(self) -> bool:
        """Whether a term looks at the reference."""
        return self.chosen_hinge > 0 or self.drift > 0


class Reference(Config):
    """What the policy is measured against and held to."""

    type: Literal["auto", "frozen_copy", "cached", "ema"] = "auto"
    """auto: the model as it was before training: with a LoRA left out, otherwise as a frozen copy. frozen_copy: as a
    copy in either case. cached: its errors, computed once for num_draws draws of noise and timestep per pair, so that
    no step asks it. ema: a running average of the policy, which follows it slowly."""
    num_draws: int = Field(4, ge=1)
    """Draws per pair of cached; epoch e repeats draw e mod num_draws. As many as there are epochs change nothing; a
    quarter of that was no worse (docs/benchmarks/reference.md)."""
    ema_decay: float = Field(0.99, ge=0, lt=1)
    """Share of the average that is kept at every step of ema."""


class Evaluation(Config):
    """Held-out pairs, scored on a fixed grid of timesteps and noise, so that curves are smooth."""

    share: float = Field(0.05, ge=0, lt=1)
    """Share of the pairs that is held out, whole prompts at a time; 0 trains on all."""
    max_pairs: int = Field(64, ge=1)
    """Hold out at most so many pairs."""
    num_timesteps: int = Field(8, ge=1)
    """Timesteps of the grid, evenly spaced, each with its own noise."""
    every_steps: int = Field(50, ge=1)
    """Evaluate every so many steps, and at the end."""
    max_kl: float | None = Field(None, gt=0)
    """Stop when the estimated KL divergence from the reference, in nats per image, exceeds this."""


class TrainConfig(Config):
    """Preference pairs -> a tuned model, by Diffusion-DPO (arXiv 2311.12908)."""

    model: plugin("models") = "stable_diffusion"  # type: ignore[valid-type]
    """The model to tune, and what of it is trained."""
    data: plugin("data") = "auto"  # type: ignore[valid-type]
    """The preference pairs; `train PATH` is the same as data.path=PATH, and the layout is found."""
    loss: plugin("losses") = "dpo"  # type: ignore[valid-type]
    """The objective."""
    weighting: Weighting = Weighting()
    """Which noise levels count."""
    regularizers: Regularizers = Regularizers()
    """What is added to the objective."""
    safeguard_mu: float | None = Field(None, ge=0, le=1)
    """Scale down the rejected image's gradient so that a step lowers the chosen image's error (Diffusion-SDPO,
    2511.03317); null: off. Published: 0.9 for SD 1.5, 0.6 for SDXL."""
    reference: Reference = Reference()
    """What the policy is held to."""
    score_metric: str | None = None
    """The metric, for what looks at scores; null takes the one that labelled the pairs."""
    score_gain_weighting: bool = False
    """Weigh a pair by |2^s_chosen - 2^s_rejected|, with scores s from 0, the worst of the data, to 1, the best."""
    swap_labels: bool = False
    """Train towards what was rejected: a model to be used as the negative one of guidance (Diffusion-NPO)."""
    order: Literal["shuffled", "curriculum"] = "shuffled"
    """curriculum: first the pairs with the widest margin, then step by step the others (2405.13637)."""
    curriculum_stages: int = Field(5, ge=2)
    """Stages of the curriculum; each adds equally many pairs."""
    curriculum_steps: int = Field(25, ge=1)
    """Steps per stage; the last one, with all pairs, goes on to the end."""
    evaluation: Evaluation = Evaluation()
    """Held-out pairs."""
    optimizer: Literal["adamw", "adamw_8bit", "adafactor"] = "adamw"
    """adamw_8bit keeps its state in 8 bits (cuda; extra `8bit`). adafactor keeps almost none for linear layers."""
    learning_rate: float = Field(1e-5, gt=0)
    """Peak learning rate. For Stable Diffusion 1.5: 1e-5 for LoRA; full fine-tuning at batch 2048: 2e-5."""
    warmup_steps: int = Field(0, ge=0)
    """Steps over which the learning rate rises linearly from 0; it is constant afterwards."""
    max_steps: int = Field(200, ge=1)
    """Optimizer steps."""
    global_batch_size: int = Field(16, ge=1)
    """Pairs per optimizer step, over all accumulated micro-batches."""
    per_device_batch_size: int = Field(4, ge=1)
    """Pairs per forward pass; less needs less memory."""
    weight_decay: float = Field(0.01, ge=0)
    """Decoupled weight decay."""
    adam_betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    """AdamW averaging coefficients."""
    adam_epsilon: float = Field(1e-8, gt=0)
    """AdamW epsilon."""
    max_grad_norm: float = Field(1.0, gt=0)
    """The gradient is scaled down to this norm."""
    ema_decay: float | None = Field(None, gt=0, lt=1)
    """Keep a running average of the trained weights, with this share of it kept at every step, and evaluate, preview
    and save that instead of the last weights; null: off."""
    prompt_dropout: float = Field(0.1, ge=0, lt=1)
    """Share of pairs trained with the empty prompt, so that guidance keeps working; one draw per pair."""
    resolution_px: int | None = Field(None, ge=32)
    """Side of the square training images; null takes the model's own."""
    aspect_ratio_buckets: bool = False
    """Train on images of other shapes, too: each pair in the bucket nearest to its shape, of the area of
    resolution_px squared at most. Both images of a pair are in one bucket; a step takes its pairs from one."""
    bucket_step_px: int = Field(64, ge=8)
    """Sides of buckets are multiples of this."""
    random_flip: bool = False
    """Mirror half of the pairs, both images alike. Wrong where left and right matter."""
    seed: int = Field(0, ge=0, lt=2**63)
    """Decides the order, the noise, the timesteps and the initial adapter."""
    mixed_precision: Precision = "auto"
    """auto is bf16 or fp16 on cuda, fp32 elsewhere. Trained weights are float32 in any case."""
    gradient_checkpointing: bool | Literal["selective"] = False
    """Recompute activations in the backward pass: about a quarter slower, several times less memory. selective: only
    in the outer blocks, a quarter of the memory for a third of the time."""
    compile: bool = False
    """Compile the repeated blocks of the denoiser (torch.compile): a slower start, then faster steps on a GPU."""
    device: Device = "auto"
    """Where to compute; auto takes cuda, then mps, then cpu."""
    dataloader_num_workers: int = Field(0, ge=0)
    """Processes that read batches ahead; the run is the same whatever their number."""
    checkpointing_steps: int = Field(100, ge=1)
    """Save a checkpoint every so many steps."""
    checkpoints_total_limit: int = Field(2, ge=1)
    """Keep at most so many checkpoints."""
    preview: Preview | None = Preview()
    """Images drawn while training; null draws none."""
    max_broken_share: float = Field(0.05, ge=0, le=1)
    """Stop when more than this share of the rows is broken."""
    cache_dir: Path | None = None
    """Folder for encoded latents and prompts; null keeps them in `output_dir/cache`."""
    output_dir: Path = Path("runs/train")
    """The run folder; the same command again continues there."""

    @property
    def gradient_accumulation_steps(self) -> int:
        """Micro-batches per optimizer step."""
        return self.global_batch_size // self.per_device_batch_size

    @model_validator(mode="after")
    def _curriculum_reaches_all(self) -> Self:
        before_last = (self.curriculum_stages - 1) * self.curriculum_steps
        if self.order == "curriculum" and before_last >= self.max_steps:
            raise ValueError(
                "order=curriculum takes up all pairs after (curriculum_stages - 1) x curriculum_steps = "
                f"{before_last} steps, and max_steps is {self.max_steps}; lower curriculum_steps, or raise max_steps"
            )
        return self

    @model_validator(mode="after")
    def _batches_divide(self) -> Self:
        if self.global_batch_size % self.per_device_batch_size:
            raise ValueError(
                f"global_batch_size ({self.global_batch_size}) must be a multiple of per_device_batch_size "
                f"({self.per_device_batch_size}); the nearest are "
                f"{max(1, self.global_batch_size // self.per_device_batch_size) * self.per_device_batch_size} and "
                f"{-(-self.global_batch_size // self.per_device_batch_size) * self.per_device_batch_size}"
            )
        return self
