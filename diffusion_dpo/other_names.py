"""What settings of other trainers are called here: the scripts of diffusers, TRL, kohya's sd-scripts, SimpleTuner."""

import re
from collections.abc import Collection

_NO_SCHEDULE = "the learning rate rises over `warmup_steps` steps and is then constant; there is no other schedule"
_TEXT = "only the UNet is trained, at `learning_rate`; the text encoders stay as they are"
_LOGS = "every run writes metrics.jsonl and, with tensorboard installed, its event files; there is no other tracker"
_ALONE = "epochs are not counted: `max_steps` x `global_batch_size` / pairs is their number"
_PRECISION = "`mixed_precision` is auto, fp32, fp16 or bf16"
_VALIDATION = "`preview.prompts` are drawn while training, every `preview.every_steps` steps"
_SHAPE = "images keep their shape with `aspect_ratio_buckets`=true; else the middle square is trained on"
_ATTENTION = "torch's own fused attention is always on"
_RESUME = "the same command again with the same `output_dir` continues from the last checkpoint"
_CACHE = "latents and prompts are always encoded once, into `cache_dir`"
_PUSH = "after training, `diffusion-dpo push` sends the result to the hub"
_REMOVED = "the noise is plain, without an offset or a perturbation"

ANSWERS = {
    # the model
    "pretrained_model_name_or_path": "it is `model.pretrained`",
    "pretrained_model": "it is `model.pretrained`",
    "model_name": "it is `model.pretrained`",
    "pretrained_vae_model_name_or_path": "the VAE is that of `model.pretrained`",
    "vae": "the VAE is that of `model.pretrained`",
    "network_weights": "it is `model.adapter_path`",
    "rank": "it is `model.lora.rank`",
    "lora_rank": "it is `model.lora.rank`",
    "network_dim": "it is `model.lora.rank`",
    "lora_alpha": "it is `model.lora.alpha`",
    "network_alpha": "it is `model.lora.alpha`",
    "network_dropout": "there is no dropout of a LoRA; `model.lora.rank` and `max_steps` limit what it learns",
    "lora_dropout": "there is no dropout of a LoRA; `model.lora.rank` and `max_steps` limit what it learns",
    "target_modules": "it is `model.lora.targets`",
    "network_module": "a LoRA is trained unless `model.lora`=null",
    "network_train_unet_only": "only the UNet is ever trained",
    "train_text_encoder": _TEXT,
    "text_encoder_lr": _TEXT,
    "unet_lr": "it is `learning_rate`",
    "lr": "it is `learning_rate`",
    "clip_skip": "prompts are encoded by the layer that diffusers' pipeline of `model.pretrained` reads",
    "max_token_length": "prompts are cut at the length of the text encoder of `model.pretrained`, 77 tokens for CLIP",
    "v_parameterization": "the scheduler of `model.pretrained` says what it predicts",
    "non_ema_revision": "it is `model.variant`",
    # the data
    "dataset_name": "it is `data.path`, beside data.type=hub",
    "dataset_config_name": "give `data.path` the folder of that configuration",
    "train_data_dir": "it is `data.path`, beside data.type=folder, two_folders or another layout",
    "instance_data_dir": "it is `data.path`",
    "dataset_split_name": "it is `data.split`",
    "max_train_samples": "it is `data.max_rows`",
    "caption_column": "it is `data.prompt_column`",
    "proportion_empty_prompts": "it is `prompt_dropout`",
    "caption_dropout_rate": "it is `prompt_dropout`",
    "caption_dropout_probability": "it is `prompt_dropout`",
    "resolution": "it is `resolution_px`, the side of the square images",
    "center_crop": _SHAPE,
    "random_crop": _SHAPE,
    "enable_bucket": "it is `aspect_ratio_buckets`",
    "bucket_reso_steps": "it is `bucket_step_px`",
    "flip_aug": "it is `random_flip`",
    "no_hflip": "mirroring is off unless `random_flip`=true",
    "cache_latents": _CACHE,
    "cache_latents_to_disk": _CACHE,
    "vae_encode_batch_size": _CACHE,
    # the objective
    "beta_dpo": "it is `loss.beta`",
    "dpo_beta": "it is `loss.beta`",
    "loss_type": "it is `loss`, such as loss=ipo",
    "label_smoothing": "it is `loss.label_smoothing`",
    "snr_gamma": "it is `weighting.min_snr_gamma`, beside `weighting.timesteps`=min_snr",
    "min_snr_gamma": "it is `weighting.min_snr_gamma`, beside `weighting.timesteps`=min_snr",
    "noise_offset": _REMOVED,
    "input_perturbation": _REMOVED,
    "multires_noise_iterations": _REMOVED,
    "prior_loss_weight": "the reference is what holds the model, by `loss.beta`",
    "min_timestep": "it is `weighting.timestep_range`, as a share of the schedule",
    "max_timestep": "it is `weighting.timestep_range`, as a share of the schedule",
    # the steps
    "train_batch_size": "it is `per_device_batch_size`; `global_batch_size` is the pairs of a whole step",
    "per_device_train_batch_size": "it is `per_device_batch_size`; `global_batch_size` is the pairs of a whole step",
    "batch_size": "`per_device_batch_size` is the pairs of a forward pass, `global_batch_size` those of a whole step",
    "gradient_accumulation_steps": "it follows: `global_batch_size` / (`per_device_batch_size` x processes)",
    "max_train_steps": "it is `max_steps`",
    "num_train_epochs": _ALONE,
    "max_train_epochs": _ALONE,
    "lr_scheduler": _NO_SCHEDULE,
    "lr_scheduler_type": _NO_SCHEDULE,
    "lr_num_cycles": _NO_SCHEDULE,
    "lr_power": _NO_SCHEDULE,
    "lr_warmup_steps": "it is `warmup_steps`",
    "warmup_ratio": "it is `warmup_steps`, a number of steps",
    "scale_lr": "set `learning_rate` for the `global_batch_size` that is used",
    "use_8bit_adam": "it is `optimizer`=adamw_8bit",
    "optimizer_type": "it is `optimizer`",
    "optim": "it is `optimizer`",
    "adam_beta1": "it is the first of `adam_betas`",
    "adam_beta2": "it is the second of `adam_betas`",
    "adam_weight_decay": "it is `weight_decay`",
    "use_ema": "it is on where `ema_decay` is set",
    "train_seed": "it is `seed`",
    "bf16": _PRECISION,
    "fp16": _PRECISION,
    "full_bf16": _PRECISION,
    "full_fp16": _PRECISION,
    "save_precision": "a LoRA is saved in float32; `diffusion-dpo export` writes other formats",
    # the machine, the files
    "enable_xformers_memory_efficient_attention": _ATTENTION,
    "xformers": _ATTENTION,
    "sdpa": _ATTENTION,
    "allow_tf32": "torch's default for TF32 is kept; `mixed_precision`=bf16 is faster",
    "enable_gradient_checkpointing": "it is `gradient_checkpointing`",
    "max_data_loader_n_workers": "it is `dataloader_num_workers`",
    "checkpoint_every_n_steps": "it is `checkpointing_steps`",
    "save_every_n_steps": "it is `checkpointing_steps`",
    "save_every_n_epochs": "it is `checkpointing_steps`, a number of steps",
    "save_steps": "it is `checkpointing_steps`",
    "save_total_limit": "it is `checkpoints_total_limit`",
    "eval_steps": "it is `evaluation.every_steps`",
    "resume_from_checkpoint": _RESUME,
    "resume": _RESUME,
    "output_name": "it is the name of `output_dir`",
    "logging_dir": _LOGS,
    "logging_steps": _LOGS,
    "report_to": _LOGS,
    "tracker_name": _LOGS,
    "tracker_project_name": _LOGS,
    "wandb": _LOGS,
    "log_with": _LOGS,
    "validation_prompt": _VALIDATION,
    "validation_prompts": _VALIDATION,
    "run_validation": _VALIDATION,
    "validation_steps": "it is `preview.every_steps`; held-out pairs are evaluated every `evaluation.every_steps`",
    "validation_epochs": "it is `preview.every_steps`, a number of steps",
    "num_validation_images": "one image of each of `preview.prompts` is drawn",
    "sample_prompts": _VALIDATION,
    "sample_every_n_steps": "it is `preview.every_steps`",
    "push_to_hub": _PUSH,
    "hub_model_id": _PUSH,
    "hub_token": _PUSH,
}
"""Each answer names settings of `train` in backquotes, or says what is done instead."""

VALUES = {("mixed_precision", "no"): "fp32"}
"""What others write for a value, by the setting."""


def answer(name: str, known: Collection[str]) -> str | None:
    """Return what a setting of another trainer is called here, where all that the answer names is `known`."""
    text = ANSWERS.get(name.lower())
    return text if text is not None and set(named_in(text)) <= {*known} else None


def named_in(text: str) -> list[str]:
    """Return the settings that an answer names."""
    return [name for name in re.findall(r"`([^`]+)`", text) if not name.startswith("diffusion-dpo ")]
