"""The prompt and the settings that a generator left inside its image: which program wrote them, and what they say.

Known are AUTOMATIC1111's web UI, Forge and whatever writes their text (infotext.py), ComfyUI (comfyui.py), SwarmUI,
Fooocus, InvokeAI, NovelAI, Easy Diffusion, and Midjourney's description. A text that none of them wrote is not taken
for a prompt.
"""

import io
import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any

from diffusion_dpo.data.comfyui import Graph, UnknownNode
from diffusion_dpo.data.image_texts import read_image_texts
from diffusion_dpo.data.infotext import read_settings, split_infotext

_HEAD_BYTES = 1 << 15
"""As a rule all that a generator wrote lies in it; PNG and JPEG have it before the pixels."""
_EMPTY = "a generator wrote an empty prompt into it"
_JOB = re.compile(r"\s*Job ID: [0-9a-f-]{36}\s*$")
_MIDJOURNEY_SETTINGS = re.compile(r"\s--\w.*$", re.DOTALL)
_SEED = re.compile(r'(seed": ?)-?\d+')
_STEPS, _CFG = "num_inference_steps", "guidance_scale"
_INFOTEXT = {"Model": "model", "Sampler": "sampler", "Schedule type": "schedule", "Steps": _STEPS, "CFG scale": _CFG}
_SWARM = {"model": "model", "sampler": "sampler", "comfyuisampler": "sampler", "steps": _STEPS, "cfgscale": _CFG}
_FOOOCUS = {"base_model": "model", "sampler": "sampler", "steps": _STEPS, "guidance_scale": _CFG}
_INVOKE = {"model": "model", "scheduler": "sampler", "sampler": "sampler", "steps": _STEPS, "cfg_scale": _CFG}
_NOVELAI = {"model": "model", "sampler": "sampler", "steps": _STEPS, "scale": _CFG}
_EASY = {"use_stable_diffusion_model": "model", "sampler_name": "sampler", _STEPS: _STEPS, _CFG: _CFG} | {
    name: _INVOKE[name] for name in ("model", "sampler", "steps", "cfg_scale")
}


@dataclass(frozen=True)
class Made:
    """How an image came about: under the names of a candidate's origin, with the negative prompt; and its seed."""

    origin: dict[str, Any] = field(default_factory=dict)
    seed: int | None = None


@dataclass(frozen=True)
class Embedded:
    """What an image says of itself. Both `prompt` and `fault` are empty where no program that is known wrote into it.

    The `fault` says why there is no prompt, though a generator wrote something.
    """

    prompt: str = ""
    fault: str = ""
    tell: Callable[[], Made] = Made
    """Works out the rest, which takes longer than the prompt."""


def read_embedded(file: str | bytes) -> Embedded:
    """Return what an image says, of a file by its name, or of the encoded bytes; only the headers are looked at.

    Raises OSError, and EOFError for an empty file.
    """
    if isinstance(file, bytes):
        return read_texts(read_image_texts(io.BytesIO(file))[0])
    handle = os.open(file, os.O_RDONLY)
    try:
        head = os.read(handle, _HEAD_BYTES)
        if not head:
            raise EOFError("an empty file")
        texts, is_whole = read_image_texts(io.BytesIO(head))
        found = read_texts(texts)
        if not found.prompt and not is_whole and len(head) == _HEAD_BYTES:
            with open(handle, "rb", closefd=False) as stream:
                stream.seek(0)
                texts, _ = read_image_texts(stream)
            found = read_texts(texts)
    finally:
        os.close(handle)
    return found


def read_texts(texts: Mapping[str, str]) -> Embedded:
    """Return what the texts of an image say, by their keyword or the name of their EXIF tag."""
    if not texts:
        return Embedded()
    fault = ""
    for reader in (_parameters, _comfyui, _invokeai, _novelai, _plain_keys, _midjourney):  # the surest first
        try:
            found = reader(texts)
        except UnknownNode as error:
            fault = fault or str(error)
            continue
        if found is not None and found.prompt:
            return found
        fault = fault or (found.fault if found is not None else "")
    if not fault and "parameters" in texts:
        fault = "the parameters inside it are of no program that is known here"
    return Embedded(fault=fault)


def read_caption(text: str) -> Embedded:
    """Return what a text beside an image says: its prompt, or all of what AUTOMATIC1111's web UI writes there."""
    return _of_infotext(text) or Embedded(prompt=text.strip())


# --- the programs ----------------------------------------------------------------------------------------------------


def _parameters(texts: Mapping[str, str]) -> Embedded | None:
    """AUTOMATIC1111's own text, or the JSON that SwarmUI and Fooocus write in its place."""
    for name in ("parameters", "UserComment", "Comment", "ImageDescription", "Model"):
        text = texts.get(name, "").lstrip()
        if text[:1] != "{":
            found = _of_infotext(text)
        elif '"sui_image_params"' in text:
            found = _of_keys(_object(text).get("sui_image_params"), "prompt", "negativeprompt", _SWARM)
        elif '"base_model"' in text:
            found = _of_keys(_object(text), "prompt", "negative_prompt", _FOOOCUS)
        else:
            continue
        if found is not None:
            return found
    return None


def _of_infotext(text: str) -> Embedded | None:
    read = split_infotext(text)
    if read is None:
        return None
    prompt, negative, settings = read
    return Embedded(prompt, "" if prompt else _EMPTY, partial(_made_of_infotext, negative, settings))


def _made_of_infotext(negative: str, line: str) -> Made:
    settings = read_settings(line)
    origin: dict[str, Any] = {ours: settings[theirs] for theirs, ours in _INFOTEXT.items() if settings.get(theirs)}
    numbers: tuple[tuple[str, Callable[[str], float]], ...] = ((_STEPS, int), (_CFG, float))
    for name, number in numbers:
        try:
            origin[name] = number(origin[name])
        except (KeyError, ValueError):
            origin.pop(name, None)
    if negative:
        origin["negative_prompt"] = negative
    return Made(origin, _seed(settings.get("Seed")))


def _comfyui(texts: Mapping[str, str]) -> Embedded | None:
    """ComfyUI: a chunk `prompt` of PNG; in EXIF, any tag that holds `prompt:` and the graph."""
    text = texts.get("prompt", "")
    if text[:1] != "{":
        tagged = (it.partition(":")[2].lstrip() for it in texts.values() if it[:7].lower() == "prompt:")
        text = next((graph for graph in tagged if graph[:1] == "{"), "")
    if text:
        prompt, fault = _prompt_of_graph(_SEED.sub(r"\g<1>0", text))
        return Embedded(prompt, fault, partial(_made_of_graph, text))
    if "workflow" in texts or any(it[:9].lower() == "workflow:" for it in texts.values()):
        raise UnknownNode("it holds a workflow of ComfyUI without the prompt that was run")
    return None


@lru_cache(maxsize=64)
def _prompt_of_graph(text: str) -> tuple[str, str]:
    """Return the prompt, or why there is none; remembered, since the images of a prompt differ in the seed alone."""
    try:
        prompt = Graph(_object(text)).prompt()
    except UnknownNode as error:
        return "", str(error)
    return prompt, "" if prompt else _EMPTY


def _made_of_graph(text: str) -> Made:
    origin = Graph(_object(text)).settings()
    return Made(origin, _seed(origin.pop("seed", None)))


def _invokeai(texts: Mapping[str, str]) -> Embedded | None:
    if "invokeai_metadata" in texts:
        return _of_keys(_object(texts["invokeai_metadata"]), "positive_prompt", "negative_prompt", _INVOKE)
    image = _object(texts.get("sd-metadata", "")).get("image")
    if not isinstance(image, dict):
        return None
    parts = image.get("prompt")  # [{"prompt": ..., "weight": ...}], as a rule of one part
    if isinstance(parts, list) and len(parts) == 1 and isinstance(parts[0], dict):
        image = {**image, "prompt": parts[0].get("prompt")}
    return _of_keys(image, "prompt", "", _INVOKE)


def _novelai(texts: Mapping[str, str]) -> Embedded | None:
    if not texts.get("Software", "").startswith("NovelAI"):
        return None
    settings = _object(texts.get("Comment", ""))
    prompt = texts.get("Description") or settings.get("prompt")
    return _of_keys({**settings, "prompt": prompt, "model": texts.get("Source")}, "prompt", "uc", _NOVELAI)


def _plain_keys(texts: Mapping[str, str]) -> Embedded | None:
    """Easy Diffusion and small scripts: a text for each setting, the prompt as it is."""
    settings = {name.lower().replace(" ", "_"): text for name, text in texts.items()}
    prompt = settings.get("prompt", "").strip()
    return None if not prompt or prompt[0] in "{[" else _of_keys(settings, "prompt", "negative_prompt", _EASY)


def _midjourney(texts: Mapping[str, str]) -> Embedded | None:
    text = texts.get("Description") or texts.get("ImageDescription") or ""
    if not _JOB.search(text):
        return None
    prompt = _MIDJOURNEY_SETTINGS.sub("", _JOB.sub("", text)).strip()
    return Embedded(prompt, "" if prompt else _EMPTY, lambda: Made({"model": "Midjourney"}))


def _of_keys(settings: Any, prompt: str, negative: str, names: Mapping[str, str]) -> Embedded | None:
    """Return what an object of settings says; `names` are ours by its own."""
    if not isinstance(settings, dict):
        return None
    text = settings.get(prompt)
    if not isinstance(text, str):
        return Embedded(fault=f"what a generator wrote into it has no text {prompt!r}")
    return Embedded(text.strip(), "" if text.strip() else _EMPTY, partial(_made_of_keys, settings, negative, names))


def _made_of_keys(settings: Mapping[str, Any], negative: str, names: Mapping[str, str]) -> Made:
    origin: dict[str, Any] = {}
    for theirs, ours in names.items():
        value = settings.get(theirs)
        if isinstance(value, dict):  # InvokeAI's model
            value = value.get("name") or value.get("model_name")
        if isinstance(value, str | int | float) and value != "":
            origin.setdefault(ours, value)
    unwanted = settings.get(negative)
    if isinstance(unwanted, str) and unwanted.strip():
        origin["negative_prompt"] = unwanted.strip()
    return Made(origin, _seed(settings.get("seed")))


def _seed(value: Any) -> int | None:
    """Return a seed as the column of candidates holds it, 64 bits; None of anything else."""
    number = int(value) if isinstance(value, int) or (isinstance(value, str) and value.isdecimal()) else -1
    return number if 0 <= number < 2**63 else None


def _object(text: str) -> dict[str, Any]:
    """Return the object of a text of JSON; {} of anything else."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
