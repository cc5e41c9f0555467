"""The facts of a base model, from its JSON files and the names of its weight files, before any weight is read."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from diffusion_dpo.config import ConfigError
from diffusion_dpo.models.base_facts import FAMILIES, XL, BaseFacts, first_sentence, with_defaults
from diffusion_dpo.models.checkpoint_file import find_checkpoint, read_checkpoint, require_layout

POCKET_DIR = Path(__file__).parents[1] / "pocket" / "weights" / "stable-diffusion"
_KINDS = {
    "Inpaint": "an inpainting pipeline",
    "InstructPix2Pix": "an editing pipeline",
    "Upscale": "an upscaler",
    "Depth2Img": "a depth-to-image pipeline",
    "ImageVariation": "an image-variation pipeline",
    "UnCLIP": "an image-variation pipeline",
    "Video": "a video pipeline",
    "AnimateDiff": "a video pipeline",
    "ControlNet": "a pipeline with a ControlNet",
    "Adapter": "a pipeline with a T2I adapter",
    "Img2Img": "an image-to-image pipeline or a refiner",
    "LatentConsistency": "a latent consistency model, which is told its guidance",
    "Flux": "a flow transformer",
    "StableDiffusion3": "a flow transformer",
    "StableCascade": "a Stable Cascade",
    "PixArt": "a transformer",
}
"""What people most often have instead, by a part of the pipeline's name."""
_STEMS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model"}
"""How weight files begin: these in diffusers, `model` in transformers."""
_NAMES_OF_TEXT = ("text_encoder", "text_encoder_2")


def read_base(
    pretrained: str, *, revision: str | None = None, variant: str | None = None, prediction_type: str | None = None
) -> BaseFacts:
    """Read the facts of a base: of a model on the hub only its JSON files, of a checkpoint only its header.

    `prediction_type` None takes what the base says. Raises ConfigError, in one sentence, when a file is missing or
    damaged, or when it is of another family.
    """
    source = str(POCKET_DIR) if pretrained == "pocket" else pretrained
    if pretrained == "pocket" and not (POCKET_DIR / "model_index.json").exists():
        raise ConfigError(f"the pocket model is not installed at {POCKET_DIR}; scripts/train_pocket.py makes it")
    checkpoint = find_checkpoint(source)
    if checkpoint is not None:
        base = read_checkpoint(pretrained, checkpoint)
        require_layout(base)
    else:
        base = _read_pipeline(pretrained, source, revision, variant)
    if prediction_type is None:
        return base
    return replace(base, scheduler={**base.scheduler, "prediction_type": prediction_type})


def _read_pipeline(pretrained: str, source: str, revision: str | None, variant: str | None) -> BaseFacts:
    _refuse_no_pipeline(pretrained, source)
    index = _read_json(pretrained, source, "model_index.json", revision)
    pipeline_name = _require_family(pretrained, index)
    texts = _NAMES_OF_TEXT if pipeline_name == XL else _NAMES_OF_TEXT[:1]
    tokenizers = [name.replace("text_encoder", "tokenizer") for name in texts]
    for part in ("unet", "vae", "scheduler", *texts, *tokenizers):
        _require_part(pretrained, source, index, pipeline_name, part)
    settings = {
        part: _read_json(pretrained, source, f"{part}/config.json", revision) for part in ("unet", "vae", *texts)
    }
    scheduler = _read_json(pretrained, source, "scheduler/scheduler_config.json", revision)
    unet_class = settings["unet"].get("_class_name", index["unet"][1])
    if unet_class != "UNet2DConditionModel":
        raise ConfigError(f"the denoiser of {pretrained} is a {unet_class}; a UNet2DConditionModel is needed here")
    vae_class = str(settings["vae"].get("_class_name", index["vae"][1]))
    notes: tuple[str, ...] = ()
    if Path(source).is_dir():
        chosen = choose_variants(pretrained, Path(source), ("unet", "vae", *texts), variant)
        if taken := sorted({it for it in chosen.values() if it not in (None, variant)}):
            notes = (f"{pretrained}: its weights are there as variant={taken[0]} alone, which is taken",)
    return BaseFacts(
        name=pretrained,
        source=source,
        pipeline_name=pipeline_name,
        unet=with_defaults(unet_class, settings["unet"]),
        vae=with_defaults(vae_class, settings["vae"]),
        vae_class=vae_class,
        scheduler=scheduler,
        scheduler_class=str(index["scheduler"][1]),
        texts={name: settings[name] for name in texts},
        text_classes={name: str(index[name][1]) for name in texts},
        options={key: index[key] for key in ("force_zeros_for_empty_prompt",) if key in index},
        variant=variant,
        notes=notes,
    )


def _refuse_no_pipeline(name: str, source: str) -> None:
    path = Path(source)
    if path.is_dir() and not (path / "model_index.json").exists():
        raise ConfigError(f"{name} is no diffusers pipeline: it has no model_index.json")
    if not path.is_dir() and (name.startswith((".", "/", "~")) or name.count("/") != 1):
        raise ConfigError(f"there is no file or folder {name}, and it is no hub id (owner/name)")


def _read_json(name: str, source: str, file: str, revision: str | None) -> dict[str, Any]:
    """Return a JSON file of a pipeline, which must hold an object."""
    path = Path(source) / file if Path(source).is_dir() else _download(name, file, revision)
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise ConfigError(f"{name} lacks {file}; copy or download the pipeline again") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} cannot be read as JSON: {first_sentence(error)}") from error
    if not isinstance(value, dict) or not value:
        raise ConfigError(f"{path} should hold the settings of a model as a JSON object")
    return value


def _download(name: str, file: str, revision: str | None) -> Path:
    import huggingface_hub as hub
    from huggingface_hub import errors

    try:
        return Path(hub.hf_hub_download(name, file, revision=revision))
    except (OSError, ValueError, errors.HTTPError) as error:
        raise ConfigError(
            f"cannot get {name!r} from the hub: {first_sentence(error)}. Check the name, the network and, for a gated "
            f"model, `hf auth login`; or give a local folder"
        ) from error


def _require_family(name: str, index: Mapping[str, Any]) -> str:
    kind = index.get("_class_name")
    if not isinstance(kind, str):
        raise ConfigError(f"the model_index.json of {name} does not name a pipeline of diffusers (_class_name)")
    if kind not in FAMILIES:
        words = next((words for part, words in _KINDS.items() if part in kind), "another kind of model")
        raise ConfigError(
            f"{name} is a {kind}, {words}; a {' or '.join(FAMILIES)}, from which model.type "
            f"{' or '.join(FAMILIES.values())} trains, is needed here"
        )
    return kind


def _require_part(name: str, source: str, index: Mapping[str, Any], pipeline_name: str, part: str) -> None:
    """Raise ConfigError where the index does not name a part, or its folder is gone."""
    entry = index.get(part)
    if not isinstance(entry, list) or len(entry) != 2 or not isinstance(entry[1], str):
        raise ConfigError(f"{name} is a {pipeline_name} without a {part}; a whole pipeline is needed here")
    if Path(source).is_dir() and not (Path(source) / part).is_dir():
        raise ConfigError(f"{name} lacks the folder {part}/; copy or download the pipeline again")


# --- weight files ----------------------------------------------------------------------------------------------------


def choose_variants(name: str, folder: Path, parts: Sequence[str], wanted: str | None) -> dict[str, str | None]:
    """Return the variant of each part's weight files; raises ConfigError where a part has none that can be read.

    A part without the wanted one is read from the files without a name. Without a wish, a part that has no such files
    is read from the only variant that all such parts have.
    """
    found = {part: _variants(name, folder / part, _STEMS.get(part, "model")) for part in parts}
    without = [part for part, variants in found.items() if "" not in variants]
    if wanted is not None:
        if not all(wanted in found[part] for part in without) or not any(wanted in it for it in found.values()):
            raise ConfigError(f"{name} has no weights of variant={wanted}; there: {_listed(found)}")
        return {part: wanted if wanted in variants else None for part, variants in found.items()}
    shared = sorted(set.intersection(*(found[part] for part in without))) if without else []
    if without and len(shared) != 1:
        raise ConfigError(f"{name} has several variants of its weights: set variant to one of {_listed(found)}")
    return {part: shared[0] if part in without else None for part in found}


def _listed(found: Mapping[str, set[str]]) -> str:
    return ", ".join(
        sorted({variant or "the one without a name" for variants in found.values() for variant in variants})
    )


def _variants(name: str, folder: Path, stem: str) -> set[str]:
    """Return the variants of a part's weights, "" for the one without a name; raises ConfigError where it has none."""
    files = {path.name for path in folder.iterdir()}
    single = re.compile(rf"{stem}(?:\.(\w+))?\.safetensors")
    sharded = re.compile(rf"{stem}\.safetensors\.index(?:\.(\w+))?\.json")
    variants = {match[1] or "" for file in files if (match := single.fullmatch(file))}
    for file in sorted(files):
        if match := sharded.fullmatch(file):
            shards = set(_read_json(name, str(folder), file, None).get("weight_map", {}).values())
            if lost := sorted(shards - files):
                raise ConfigError(f"{folder} lacks {', '.join(lost)}, which {file} names; download it again")
            variants.add(match[1] or "")
    if variants:
        return variants
    pickles = sorted(file for file in files if file.endswith((".bin", ".pt", ".pth", ".ckpt")))
    if pickles:
        raise ConfigError(
            f"{folder} holds its weights as a pickle alone ({pickles[0]}), which can run any program when it is "
            'loaded; if you trust where it is from, convert it: python -c "from diffusers import DiffusionPipeline; '
            f"DiffusionPipeline.from_pretrained('{name}', use_safetensors=False, safety_checker=None)"
            ".save_pretrained('CONVERTED')\""
        )
    raise ConfigError(f"{folder} holds no weights ({stem}.safetensors); copy or download the pipeline again")
