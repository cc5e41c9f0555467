"""One HTML file, offline, nothing in it from outside: text is escaped, the only style and script are ours."""

import base64
import hashlib
from collections.abc import Iterator, Mapping
from importlib import resources
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from diffusion_dpo.report import words

LONG_PROMPT = 600
"""Characters of a prompt above which it is cut short until asked for."""


def fill(template: str, *, style: str, script: str = "", images: str = "data:", **values: Any) -> str:
    """Return a page: a template of this folder, filled; `style` and `script` are texts of ours, and stay raw.

    The template finds them, and a content security policy that allows nothing else, as `style`, `script` and `policy`.
    `images` says where images may come from: `data:`, or `'self'` for files beside the page, which Chromium allows a
    page that is opened from disk, too.
    """
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"clean": words.clean, "percent": words.percent, "shorten": words.shorten}
    environment.policies["json.dumps_kwargs"] = {"sort_keys": True, "separators": (",", ":")}
    ours = {"style": Markup(style), "script": Markup(script), "policy": _policy(style, script, images), "words": words}
    return environment.from_string(asset(template)).render(**ours, **values)


def asset(name: str) -> str:
    """Return the text of a file of this folder."""
    return resources.files("diffusion_dpo.report").joinpath(name).read_text(encoding="utf-8")


def flatten(facts: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield nested settings as lines of (dotted name, text)."""
    for name, value in facts.items():
        if isinstance(value, Mapping) and value:
            yield from flatten(value, f"{prefix}{name}.")
        else:
            yield words.clean(f"{prefix}{name}"), words.clean(_plain(value))


def _plain(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return ", ".join(map(_plain, value)) or "none"
    return "null" if value is None else str(value)


def _policy(style: str, script: str, images: str) -> str:
    """The content security policy: our own style and script by their hash, images from one place, nothing else."""
    rules = [
        "default-src 'none'",
        f"script-src '{_sha256(script)}'" if script else "script-src 'none'",
        f"style-src '{_sha256(style)}'",
        f"img-src {images}",
        "base-uri 'none'",
        "form-action 'none'",
    ]
    return "; ".join(rules)


def _sha256(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
