"""A single-file checkpoint as a base: recognised by its header, and read part by part, without a hub.

Every weight of every part must be in the file, in its shape; nothing is left at random, and nothing is guessed twice.
"""

import functools
import gzip
import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusion_dpo.config import ConfigError
from diffusion_dpo.models import checkpoint_settings
from diffusion_dpo.models.base_facts import XL, BaseFacts, with_defaults
from diffusion_dpo.models.checkpoint_settings import GENERATIONS, SETTINGS, Shapes
from diffusion_dpo.models.original_layout import UNET, VAE, from_original, places, shape_there, without_ones
from diffusion_dpo.models.safetensors_file import other_model, read_facts

if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline

SUFFIXES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin", ".gguf")
_NUM_TOKENS = 49408
_CLIP_TOKENS = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
_ADAPTERS: tuple[tuple[str, str], ...] = (
    ("lora_", "a LoRA: give it as adapter_path, and the model that it was made for as pretrained"),
    (".lora.", "a LoRA: give it as adapter_path, and the model that it was made for as pretrained"),
    ("hada_", "a LoHa: merge it into its model with the program that made it"),
    ("lokr_", "a LoKr: merge it into its model with the program that made it"),
)
"""Which adapter a file is, by a part of its tensors' names; the first that is found counts."""
_NEVER_PART_OF_ONE = ("a FLUX", "a Stable Diffusion 3", "a ControlNet", "a LoRA")


def find_checkpoint(pretrained: str) -> Path | None:
    """Return the single-file checkpoint that a path is, or that its folder holds instead of a pipeline.

    Raises ConfigError for a file that is none, and for a folder that holds several.
    """
    path = Path(pretrained)
    if path.is_dir() and not (path / "model_index.json").exists():
        found = sorted(it for it in path.iterdir() if it.is_file() and it.suffix in SUFFIXES)
        if len(found) > 1:
            raise ConfigError(
                f"{path} is no diffusers pipeline: it has no model_index.json; it holds {len(found)} files of "
                f"weights, such as {found[0].name}: name one of them"
            )
        path = found[0] if found else path
    if not path.is_file():
        return None
    if path.suffix == ".gguf":
        raise ConfigError(f"{path} is a GGUF file, whose weights are rounded to few bits; safetensors are needed")
    if path.suffix != ".safetensors":
        raise ConfigError(
            f"{path} is a pickle by its suffix, which can run any program when it is loaded; convert it to "
            "safetensors, such as with A1111's Checkpoint Merger, if you trust where it is from, and give that file"
        )
    return path


def read_checkpoint(name: str, file: Path) -> BaseFacts:
    """Return the facts of a base that is one file; raises ConfigError for what is no whole Stable Diffusion."""
    header = read_facts(file)
    shapes = header.shapes
    kind = checkpoint_settings.generation_of(shapes)
    _refuse_others(file, shapes, kind)
    assert kind is not None
    found = checkpoint_settings.written(header.metadata)
    found = found or checkpoint_settings.infer(str(file), kind, shapes, header.metadata)
    texts: dict[str, Any] = {part: found[part] for part in ("text_encoder", "text_encoder_2") if part in found}
    second = {"text_encoder_2": "CLIPTextModelWithProjection"} if kind == "xl" else {}
    base = BaseFacts(
        name=name,
        source=str(file),
        pipeline_name=XL if kind == "xl" else "StableDiffusionPipeline",
        unet=with_defaults("UNet2DConditionModel", found["unet"]),
        vae=with_defaults("AutoencoderKL", found["vae"]),
        vae_class="AutoencoderKL",
        scheduler=found["scheduler"],
        scheduler_class=found["scheduler_class"],
        texts=texts,
        text_classes={"text_encoder": "CLIPTextModel"} | second,
        options={"force_zeros_for_empty_prompt": True} if kind == "xl" else {},
        tokenizers=found.get("tokenizers", {}),
        file=file,
        notes=(found["note"],) if "note" in found else (),
    )
    for part, text in texts.items():
        if text["vocab_size"] != _NUM_TOKENS and part not in base.tokenizers:
            raise ConfigError(
                f"the {part} of {file} knows {text['vocab_size']} tokens, not the {_NUM_TOKENS} of CLIP: which they "
                "are is not in the file; give the diffusers folder"
            )
    return base


def require_layout(base: BaseFacts) -> None:
    """Raise ConfigError unless the file holds every weight of the parts that its settings describe, in its shape."""
    assert base.file is not None
    shapes = read_facts(base.file).shapes
    parts = build(base)
    for part, of_part in places(parts).items():
        expected = {key: tuple(value.shape) for key, value in parts[part].state_dict().items()}
        for key, place in of_part.items():
            there = shapes.get(place.name)
            if there is None:
                raise ConfigError(
                    f"{base.file} lacks {place.name}, a weight of its {part}: it is not whole; fetch it again, or "
                    "give another checkpoint or a diffusers folder"
                )
            wanted = shape_there(place, expected[key])
            if (without_ones(there) if place.as_convolution else there) != wanted:
                raise ConfigError(f"{base.file} holds {place.name} of shape {list(there)}; {list(wanted)} is needed")


def build(base: BaseFacts) -> dict[str, Any]:
    """Return UNet, VAE and text encoders on the meta device, without weights."""
    import diffusers
    import torch
    import transformers

    with torch.device("meta"):
        parts: dict[str, Any] = {
            "unet": diffusers.UNet2DConditionModel.from_config(dict(base.unet)),
            "vae": diffusers.AutoencoderKL.from_config(dict(base.vae)),
        }
        for part, text in base.texts.items():
            config = transformers.CLIPTextConfig.from_dict(dict(text))
            parts[part] = getattr(transformers, base.text_classes[part])(config)
    return parts


def load_checkpoint(base: BaseFacts, dtypes: "Mapping[str, torch.dtype]") -> dict[str, Any]:
    """Return the parts of a pipeline with the weights of the file, each in its dtype, and its tokenizers."""
    import torch
    from safetensors import safe_open

    assert base.file is not None
    parts = build(base)
    where = places(parts)
    with safe_open(base.file, framework="pt") as tensors:
        for part, of_part in where.items():
            module = parts[part]
            shapes = {key: tuple(value.shape) for key, value in module.state_dict().items()}
            weights = {
                key: from_original(place, tensors.get_tensor(place.name), shapes[key]).to(dtypes[part]).contiguous()
                for key, place in of_part.items()
            }
            module.load_state_dict(weights, strict=False, assign=True)
            _fill_buffers(module, torch.device("cpu"))
            parts[part] = module.to(dtypes[part]).eval()
    for part in base.texts:
        parts[part.replace("text_encoder", "tokenizer")] = _tokenizer(base, part)
    return parts


def _fill_buffers(module: Any, device: "torch.device") -> None:
    """Give the numbers of positions, which no file holds, their values."""
    import torch

    for part in module.modules():
        for name, value in list(part.named_buffers(recurse=False)):
            if value.is_meta:
                assert name == "position_ids", f"no value is known for the buffer {name}"
                part.register_buffer(name, torch.arange(value.shape[-1], device=device)[None], persistent=False)


def _refuse_others(file: Path, shapes: Shapes, kind: str | None) -> None:
    """Raise ConfigError, saying what a file is, unless it holds UNet, VAE and text encoders of one family."""
    convert = "a whole checkpoint of Stable Diffusion 1.x, 2.x or SDXL, or a diffusers folder, is needed as pretrained"
    whole = [key for key in shapes if key.startswith(UNET)]
    adapter = next((text for part, text in _ADAPTERS if any(part in key for key in shapes)), None)
    what = adapter or other_model(shapes)
    if what is not None and (not whole or what.startswith(_NEVER_PART_OF_ONE)):
        raise ConfigError(f"{file} is {what}; {convert}")
    if not whole:
        first = next(iter(shapes), "no tensors")
        raise ConfigError(f"{file} is no checkpoint of Stable Diffusion: it holds {first[:80]}; {convert}")
    if any("edm_vpred" in key or "edm_mean" in key for key in shapes):
        raise ConfigError(f"{file} has the continuous noise levels of EDM, which are not trained here; {convert}")
    if any(".time_stack." in key or ".time_mixer." in key for key in whole):
        raise ConfigError(f"{file} is a video model; {convert}")
    if any(".cond_proj." in key for key in whole):
        raise ConfigError(f"{file} is a latent consistency model, which is told its guidance scale; {convert}")
    if kind is None and any(key.startswith("conditioner.embedders.0.model.") for key in shapes):
        raise ConfigError(f"{file} is SDXL's refiner; {convert}")
    if kind != "xl" and any(".label_emb." in key for key in whole):
        raise ConfigError(f"{file} is told more than a prompt, as image variation models and upscalers are; {convert}")
    if kind is None:
        raise ConfigError(f"{file} holds a UNet without text encoders; {convert}")
    if not any(key.startswith(f"{VAE}decoder.") for key in shapes):
        raise ConfigError(f"{file} is a single-file checkpoint of {GENERATIONS[kind]} without its VAE; {convert}")


def write_settings(base: BaseFacts, folder: Path) -> None:
    """Write the settings of a checkpoint as a folder of diffusers has them, without weights."""
    import diffusers

    index: dict[str, Any] = {"_class_name": base.pipeline_name, **base.options}
    for part, model in build(base).items():
        save = model.config.save_pretrained if part in base.texts else model.save_config
        save(folder / part)
        index[part] = ["transformers" if part in base.texts else "diffusers", type(model).__name__]
    for part in base.texts:
        name = part.replace("text_encoder", "tokenizer")
        _tokenizer(base, part).save_pretrained(folder / name)
        index[name] = ["transformers", "CLIPTokenizer"]
    scheduler = getattr(diffusers, base.scheduler_class).from_config(dict(base.scheduler))
    scheduler.save_pretrained(folder / "scheduler")
    index["scheduler"] = ["diffusers", base.scheduler_class]
    (folder / "model_index.json").write_text(json.dumps(index), encoding="utf-8")


# --- tokenizers ------------------------------------------------------------------------------------------------------


def header_settings(pipeline: "DiffusionPipeline") -> dict[str, str]:
    """Return the entry of a header that says of a pipeline what the shapes of its weights do not."""
    parts = pipeline.components
    texts = [name for name in ("text_encoder", "text_encoder_2") if name in parts]
    settings: dict[str, Any] = {name: _public(parts[name].config) for name in ("unet", "vae")}
    settings |= {name: _public(parts[name].config.to_dict()) for name in texts}
    settings |= {"scheduler": _public(pipeline.scheduler.config), "scheduler_class": type(pipeline.scheduler).__name__}
    settings["tokenizers"] = {
        name: _spelled(parts[name.replace("text_encoder", "tokenizer")])
        for name in texts
        if parts[name].config.vocab_size != _NUM_TOKENS
    }
    return {SETTINGS: json.dumps(settings, sort_keys=True, default=list)}


def _public(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if not key.startswith("_") and key != "transformers_version"}


def vocabulary(tokenizer: Any) -> tuple[dict[str, int], list[str]]:
    """Return the numbers of a CLIP tokenizer's tokens, and its merges, two parts with a space between, in order."""
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    merges = [it if isinstance(it, str) else " ".join(it) for it in model["merges"]]
    return dict(sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])), merges


def _spelled(tokenizer: Any) -> dict[str, Any]:
    vocab, merges = vocabulary(tokenizer)
    names = ("bos_token", "eos_token", "unk_token", "pad_token", "model_max_length")
    return {"vocab": vocab, "merges": merges, **{name: getattr(tokenizer, name) for name in names}}


def _tokenizer(base: BaseFacts, part: str) -> Any:
    """Return a text encoder's tokenizer: that of the header, else CLIP's.

    OpenAI's CLIP is padded with the end token, OpenCLIP with the token of number 0, an exclamation mark.
    """
    from transformers import CLIPTokenizer

    own = dict(base.tokenizers.get(part, {}))
    if own:
        merges = [tuple(line.split(" ")) for line in own.pop("merges")]
        return CLIPTokenizer(vocab=own.pop("vocab"), merges=merges, **own)
    vocab, pairs = _clips_vocabulary()
    padding = "<|endoftext|>" if base.texts[part].get("hidden_act") == "quick_gelu" else "!"
    return CLIPTokenizer(vocab=vocab, merges=pairs, **_CLIP_TOKENS, pad_token=padding, model_max_length=77)


@functools.cache
def _clips_vocabulary() -> tuple[dict[str, int], list[tuple[str, ...]]]:
    """Read CLIP's byte pairs from the file that open_clip brings (Radford et al. 2021; MIT)."""
    spec = importlib.util.find_spec("open_clip")
    assert spec is not None and spec.submodule_search_locations is not None
    file = Path(spec.submodule_search_locations[0]) / "bpe_simple_vocab_16e6.txt.gz"
    num_bytes, num_ends = 256, 2
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        text = lines.read().split("\n")[1 : _NUM_TOKENS - num_ends - 2 * num_bytes + 1]
    pairs = [tuple(line.split()) for line in text]
    symbols = _byte_symbols()
    tokens = [*symbols, *(f"{symbol}</w>" for symbol in symbols), *("".join(pair) for pair in pairs)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    assert len(tokens) == _NUM_TOKENS
    return {token: number for number, token in enumerate(tokens)}, pairs


def _byte_symbols() -> list[str]:
    """The printable symbols that stand for the 256 bytes, in the order of CLIP's vocabulary."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + number) for number in range(len(others))]
