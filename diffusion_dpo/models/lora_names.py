"""Whose names the layers of a LoRA file have, what each of its tensors is, and which kinds of file are no plain LoRA.

A tensor's name is the layer's, in the spelling of some program, and an ending that says what the tensor is: kohya's
`lora_unet_down_blocks_0_..._to_q.lora_down.weight`, diffusers' `unet.down_blocks.0....to_q.lora_A.weight`, and others.
The spellings of layers are not parsed: they are made from the model (`spellings`), and looked up.
"""

import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Literal

from diffusion_dpo.models.original_names import unet_names

if TYPE_CHECKING:
    from torch import nn

Role = Literal["down", "up", "mid", "alpha", "magnitude", "bias"]
"""What a tensor of a LoRA is: A, B, the core of a Tucker decomposition, alpha, DoRA's magnitude, the bias of B."""

_ROLES: dict[Role, str] = {
    "bias": r"\.lora_B(?:\.\w+)?\.bias",  # before `up`, which might take it for an adapter's name
    "down": r"(?:\.lora_down|\.lora_A(?:\.\w+)?|[._]lora\.down|\.lora_linear_layer\.down)(?:\.weight)?",
    "up": r"(?:\.lora_up|\.lora_B(?:\.\w+)?|[._]lora\.up|\.lora_linear_layer\.up)(?:\.weight)?",
    "mid": r"\.lora_mid(?:\.weight)?",
    "alpha": r"\.alpha",
    "magnitude": r"\.lora_magnitude_vector(?:\.\w+)*",
}
_OTHER_KINDS = {
    "a DoRA of kohya or LyCORIS (dora_scale)": r"\.dora_scale",
    "a LoHa (hada_*)": r"\.hada_\w+(?:\.\w+)*",
    "a LoKr (lokr_*)": r"\.lokr_\w+(?:\.\w+)*",
    "a GLoRA (a1, a2, b1, b2)": r"\.(?:[ab][12]|bm)\.weight",
    "an OFT or BOFT (oft_*, boft_*)": r"(?i:\.b?oft_\w+(?:\.\w+)*)",
    "an (IA)^3 (on_input, ia3_l)": r"\.(?:on_input|ia3_l(?:\.\w+)*)",
    "a VeRA (vera_lambda_*)": r"\.vera_\w+(?:\.\w+)*",
    "full differences of weights (diff, diff_b)": r"\.(?:diff|diff_b|set_weight)",
    "differences of norms (w_norm, b_norm)": r"\.[wb]_norm",
}
"""What LyCORIS and others write beside or instead of a plain LoRA, in words, by the endings of their tensors."""
_BUNDLED = "bundle_emb."
"""What OneTrainer puts before the embeddings (textual inversions) that it writes beside a LoRA's layers."""

_PREFIXES: tuple[tuple[str, str | None], ...] = (
    ("lora_unet_", "unet"),
    ("lora_te2_", "text_encoder_2"),
    ("lora_te1_", "text_encoder"),
    ("lora_te_", "text_encoder"),
    ("lycoris_", None),
    ("wrapped_transformer_", None),  # after lora_te_, by A1111's extension of early 2023
    ("unet.", "unet"),
    ("text_encoder_2.", "text_encoder_2"),
    ("text_encoder.", "text_encoder"),
    ("model.diffusion_model.", "unet"),
    ("diffusion_model.", "unet"),
    ("base_model.model.", None),
    ("text_encoders.", None),
    ("clip_l.", "text_encoder"),
    ("clip_g.", "text_encoder_2"),
    ("transformer.text_model.", None),
)
"""What programs put before a layer's path, and the part of the pipeline that it says."""
_TRANSFORMERS = ("lora_transformer_", "lora_prior_unet_", "lora_te3_", "transformer.", "text_encoder_3.", "prior.")

_FAMILIES = (
    ("FLUX, or a model of its layout such as Chroma or HunyuanVideo", r"(?:double|single)_(?:transformer_)?blocks"),
    ("Stable Diffusion 3", r"joint_(?:transformer_)?blocks"),
    ("Qwen-Image", r"transformer_blocks[._]\d+[._](?:img|txt)_m"),
    ("Wan", r"(?:vace_)?blocks[._]\d+[._](?:self|cross)_attn"),
    ("a transformer (FLUX, Stable Diffusion 3, Qwen-Image, ...)", r"(?:transformer_blocks|blocks|layers)[._]\d"),
)
"""Families without a UNet of Stable Diffusion, by how the paths of their layers begin."""

_ROLE = re.compile(f"(?:{'|'.join(f'(?P<{role}>{ending})' for role, ending in _ROLES.items())})\\Z")


def role_of(key: str) -> tuple[str, Role] | None:
    """Return the layer that a tensor belongs to, as the file spells it, and what of a LoRA it is; None: nothing."""
    match = _ROLE.search(key)
    if match is None or not match.start():
        return None
    role: Role = match.lastgroup  # type: ignore[assignment]
    return key[: match.start()], role


def is_bundled(key: str) -> bool:
    """Whether a tensor is of an embedding that was bundled with a LoRA, which is none of its layers."""
    return key.startswith(_BUNDLED)


def other_kind(key: str) -> str | None:
    """Return what a tensor is, where it is of a kind of adapter that is no LoRA of two factors."""
    for words, ending in _OTHER_KINDS.items():
        if re.search(f"(?:{ending})\\Z", key):
            return words
    return None


def part_of(layer: str) -> tuple[str | None, str]:
    """Return the part of the pipeline that the spelling of a layer says, if it does, and the path that is left."""
    part, path, found = None, layer, True
    while found:
        found = False
        for prefix, says in _PREFIXES:
            if path.startswith(prefix):
                part, path, found = says or part, path.removeprefix(prefix), True
    return part, path


def other_family(keys: Iterable[str]) -> str | None:
    """Return for which family that has no UNet of Stable Diffusion the names are, in words; None: for none known."""
    paths = [part_of(key)[1] for key in keys]
    bare = [path.removeprefix(next((it for it in _TRANSFORMERS if path.startswith(it)), "")) for path in paths]
    for family, begin in _FAMILIES:
        if any(re.match(begin, path) for path in bare):
            return family
    if any(path != short and not short.startswith("text_model") for path, short in zip(paths, bare, strict=True)):
        return _FAMILIES[-1][0]
    return None


def naming_of(layers: Iterable[str]) -> str:
    """Return whose names the layers of a file have, in a word or two."""
    layers = list(layers)
    if all(layer.startswith(("lora_unet_", "lora_te", "lycoris_")) for layer in layers):
        return "kohya"
    if all(layer.startswith(("unet.", "text_encoder.", "text_encoder_2.")) for layer in layers):
        return "diffusers"
    if any(".processor." in layer for layer in layers):
        return "diffusers 2023"
    return "peft" if all(layer.startswith("base_model.model.") for layer in layers) else "bare or mixed"


def spellings(part: str, model: "nn.Module") -> dict[str, str]:
    """Return the path of every layer of a part that can carry a LoRA, by each of its spellings, dots as underscores.

    Those of a UNet are diffusers', the original ones (input_blocks.4.1...), and the attention processors' of 2023;
    those of a text encoder are transformers', before and since version 5.6.
    """
    from torch import nn

    paths = [path for path, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    found: dict[str, str] = {}
    for path in paths:
        names = [path, *_old_spellings(path)]
        if part != "unet":
            bare = path.removeprefix("text_model.")
            names += [bare, f"text_model.{bare}"]
            names += [name for old in _old_spellings(bare) for name in (old, f"text_model.{old}")]
        for name in names:
            found.setdefault(_joined(name), path)
    if part == "unet":
        for path, name in _original(paths, unet_names(model)):
            found.setdefault(_joined(name), path)
    return found


def find(spelled: Mapping[str, str], path: str) -> str | None:
    """Return the path of the layer that a file spells so, among the `spellings` of a part."""
    return spelled.get(_joined(path))


def _original(paths: list[str], names: Mapping[str, str]) -> Iterable[tuple[str, str]]:
    for path in paths:
        begin = path
        while begin not in names and begin:  # the layers within a transformer keep their names
            begin = begin.rpartition(".")[0]
        if begin:
            yield path, names[begin] + path[len(begin) :]


def _old_spellings(path: str) -> list[str]:
    """Return how the attention processors of 2023 spelled a layer: `attn1.processor.to_out` of `attn1.to_out.0`."""
    block, _, layer = path.removesuffix(".0").rpartition(".")
    if layer in ("to_q", "to_k", "to_v", "to_out"):
        return [f"{block}.{layer}", f"{block}.processor.{layer}"]
    if block.endswith("self_attn") and layer.endswith("_proj"):  # of a text encoder
        return [f"{block}.to_{layer.removesuffix('_proj')}"]
    return []


def _joined(path: str) -> str:
    return path.replace(".", "_")
