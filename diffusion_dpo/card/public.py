"""The names and settings of a run as others may see them: hub ids stay, of a path of this machine its last name."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusion_dpo.settings import TrainConfig

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_SECRET = ("token", "secret", "password", "api_key", "authorization")


def is_hub_id(name: str) -> bool:
    """Whether a name is `owner/name` on the hub rather than a file or folder here, seen from where we are."""
    return bool(HUB_ID.fullmatch(name)) and not Path(name).exists()


def public_name(name: str) -> str:
    """Return a hub id as it is; of a file or folder its name alone."""
    return name if is_hub_id(name) or not name else Path(name).name


def public_base(config: TrainConfig, facts: Mapping[str, Any]) -> str:
    """Return the base's hub id; of a local folder its name alone.

    Which of them it is, is seen from where training ran, and noted among the facts of its manifest.
    """
    return str(facts.get("base") or public_name(str(config.model.model_dump().get("pretrained", config.model.type))))


def public_data(config: TrainConfig, facts: Mapping[str, Any]) -> str:
    """Return the data's hub id; of a local file or folder its name alone; "" without a path. Noted as the base is."""
    if facts.get("data"):
        return str(facts["data"])
    path = str(config.data.model_dump().get("path", ""))
    return public_name(path) if config.data.type == "hub" else Path(path).name


def public_start(config: TrainConfig) -> str | None:
    """Return the name of the adapter that training starts from, None without one."""
    path = config.model.model_dump().get("adapter_path")
    return None if path is None else Path(path).resolve().name


def public_settings(config: TrainConfig, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a run for others: base and data by their public names, the rest scrubbed."""
    settings = config.model_dump(mode="json")
    if "pretrained" in settings["model"]:
        settings["model"]["pretrained"] = public_base(config, facts)
    if "path" in settings["data"]:
        settings["data"]["path"] = public_data(config, facts)
    scrubbed: dict[str, Any] = scrub(settings)
    return scrubbed


def scrub(value: Any, key: str = "") -> Any:
    """Return settings without secrets, and with the last name alone of every path of this machine."""
    if isinstance(value, Mapping):
        kept = {name: inner for name, inner in value.items() if not _is_secret(str(name))}
        if value.get("type") == "hub":  # whose path may be the name of a data set
            return {name: scrub(inner, "" if name == "path" else str(name)) for name, inner in kept.items()}
        return {name: scrub(inner, str(name)) for name, inner in kept.items()}
    if isinstance(value, list):
        return [scrub(item, key) for item in value]
    if not isinstance(value, str) or key in ("prompts", "negative_prompt"):
        return value
    if "://" in value:
        return value.split("://", 1)[0] + "://..."
    by_name = key == "path" or key.endswith(("_path", "_dir"))
    is_one_word = not any(letter.isspace() for letter in value)
    by_look = "/" in value and not is_hub_id(value) and (is_one_word or Path(value).exists())
    return Path(value).name if by_name or by_look or value.startswith(("/", "~")) else value


def _is_secret(name: str) -> bool:
    return any(word in name.lower().replace("-", "_") for word in _SECRET)
