"""What a base must be so that it is trained as it draws; all else is refused by name, before a weight is read."""

import inspect
from typing import Any, get_args

from diffusion_dpo.config import ConfigError
from diffusion_dpo.models.base_facts import FAMILIES, BaseFacts, first_sentence
from diffusion_dpo.settings import PredictionType

_TEXT_CLASSES = ("CLIPTextModel", "CLIPTextModelWithProjection")
_VAE = "AutoencoderKL"
_SCHEDULE = {"num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type"}
_SCHEDULE |= {"rescale_betas_zero_snr"}
_SAME_SCHEDULE = 1e-4
"""Relative: by how much alpha_t^2 may differ. Euler's last one is 2^-24 where others have 0."""


def require_drawable(base: BaseFacts) -> None:
    """Raise ConfigError unless a base draws from prompts alone, with UNet, VAE and CLIP as its family has them."""
    name, unet = base.name, base.unet
    channels, latents = unet["in_channels"], base.vae.get("latent_channels")
    if channels != latents:
        raise ConfigError(
            f"the UNet of {name} takes {channels} channels, not {latents}: an inpainting or editing model?"
        )
    if unet["out_channels"] != channels:
        raise ConfigError(
            f"the UNet of {name} gives {unet['out_channels']} channels for {channels}: it predicts a variance, too"
        )
    wanted = "text_time" if base.is_xl else None
    if unet["addition_embed_type"] != wanted:
        raise ConfigError(
            f"the UNet of {name} has addition_embed_type={unet['addition_embed_type']}, not {wanted} as a "
            f"{base.pipeline_name} has"
        )
    for key in ("class_embed_type", "num_class_embeds", "encoder_hid_dim_type"):
        if unet[key] is not None:
            raise ConfigError(
                f"the UNet of {name} has {key}={unet[key]}: it is told more than a prompt, which is not known here"
            )
    if base.vae.get("latents_mean") is not None:
        raise ConfigError(
            f"the VAE of {name} normalizes its latents in a way of its own (latents_mean); models on it are not known"
        )
    for part, kind in base.text_classes.items():
        if kind not in _TEXT_CLASSES:
            raise ConfigError(f"the {part} of {name} is a {kind}; {' or '.join(_TEXT_CLASSES)} is needed here")
    _require_widths(base)


def _require_widths(base: BaseFacts) -> None:
    """What the text encoders say has the width that the UNet reads."""
    width = base.unet["cross_attention_dim"]
    given = [text.get("hidden_size", 512) for text in base.texts.values()]
    if isinstance(width, int) and width != sum(given):
        raise ConfigError(
            f"the UNet of {base.name} reads text embeddings of width {width}, and the text encoders give "
            f"{' + '.join(map(str, given))}: are they of another model?"
        )
    if base.is_xl:
        pooled = base.texts["text_encoder_2"].get("projection_dim", 512)
        reads = base.unet["projection_class_embeddings_input_dim"]
        if reads != pooled + 6 * base.unet["addition_time_embed_dim"]:
            raise ConfigError(f"the UNet of {base.name} is told other sizes than SDXL's six numbers: a refiner?")


def require_trainable(base: BaseFacts, wanted: str | None = None) -> None:
    """Raise ConfigError unless training models all that a base draws with, and its pipeline is a `wanted`."""
    require_drawable(base)
    if wanted is not None and base.pipeline_name != wanted:
        raise ConfigError(
            f"{base.name} is a {base.pipeline_name}, which model.type={FAMILIES[base.pipeline_name]} trains, not "
            f"{FAMILIES[wanted]}"
        )
    if base.vae_class != _VAE:
        raise ConfigError(
            f"the VAE of {base.name} is a {base.vae_class}, which gives no distribution of latents as {_VAE} does; "
            f"training needs the {_VAE} of the model's family: put its folder in place of vae/"
        )
    if base.unet["time_cond_proj_dim"] is not None:
        raise ConfigError(
            f"the UNet of {base.name} is told its guidance scale (time_cond_proj_dim, a latent consistency model), "
            "which training does not model; train the model that it was distilled from"
        )
    _require_schedule(base)


def _require_schedule(base: BaseFacts) -> None:
    """The scheduler that draws has the noise levels of DDPM, which is what training adds noise by."""
    import diffusers
    import torch

    kind = base.scheduler_class
    named = f"the scheduler of {base.name} is a {kind}"
    needed = "a scheduler with betas, such as DDIMScheduler or EulerDiscreteScheduler, is needed for training"
    made_by: Any = getattr(diffusers, kind, None)
    if made_by is None:
        raise ConfigError(f"{named}, which diffusers does not have; {needed}")
    try:
        scheduler = made_by.from_config(dict(base.scheduler))
    except (ImportError, NotImplementedError, TypeError, ValueError) as error:
        raise ConfigError(f"{named}, which cannot be made: {first_sentence(error)}") from error
    config = scheduler.config
    levels = getattr(scheduler, "alphas_cumprod", None)
    if levels is None or config.get("use_flow_sigmas") or str(config.get("prediction_type")).startswith("flow"):
        what = (
            "whose noise levels are those of a flow" if "low" in kind or levels is not None else "which has no betas"
        )
        raise ConfigError(f"{named}, {what}; {needed}")
    predicts = config.get("prediction_type", "epsilon")
    if predicts not in get_args(PredictionType):
        raise ConfigError(f"{base.name} predicts {predicts!r}; one of {', '.join(get_args(PredictionType))} is needed")
    try:
        trained = with_schedule(diffusers.DDPMScheduler, scheduler).alphas_cumprod
    except (NotImplementedError, TypeError, ValueError) as error:
        raise ConfigError(f"{named}, with a schedule that DDPM does not have: {first_sentence(error)}") from error
    if len(levels) != len(trained) or not torch.allclose(levels, trained, rtol=_SAME_SCHEDULE, atol=1e-6):
        raise ConfigError(f"{named}, whose noise levels are others than DDPM's with these settings; {needed}")


def with_schedule(kind: Any, scheduler: Any) -> Any:
    """Return a scheduler of another class with the noise levels and the prediction of a given one.

    `from_config` alone leaves out what the given one has by the defaults of its class, and takes its own defaults.
    """
    accepted = _SCHEDULE & inspect.signature(kind).parameters.keys() & scheduler.config.keys()
    return kind.from_config(scheduler.config, **{key: scheduler.config[key] for key in accepted})
