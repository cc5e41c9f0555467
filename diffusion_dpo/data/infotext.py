"""The text that AUTOMATIC1111's web UI, Forge and many others write: the prompt, the negative prompt, the settings.

    a lighthouse, oil painting
    Negative prompt: blurry
    Steps: 20, Sampler: Euler a, Schedule type: Karras, CFG scale: 7, Seed: 965400086, Model: dreamshaper_8

Prompts may have several lines, values may be quoted JSON strings with commas in them, and lines of extensions may
follow.
"""

import json
import re

_FIRST = "\nSteps: "
_NEGATIVE = "\nNegative prompt:"
_VALUE = re.compile(r'\s*(\w[\w \-/.]*):\s*("(?:\\.|[^\\"])*"|[^,]*)(?:,|$)')
_LEAST_SETTINGS = 3


def split_infotext(text: str) -> tuple[str, str, str] | None:
    """Return the prompt, the negative prompt and the line of settings; None of any other text."""
    text = "\n" + text.replace("\r\n", "\n")
    start = text.rfind(_FIRST)
    if start < 0:
        return None
    line = text[start + 1 :].partition("\n")[0]
    if line.count(": ") < _LEAST_SETTINGS or not line[7:8].isdecimal():
        return None
    prompt, _, negative = text[:start].partition(_NEGATIVE)
    return prompt.strip(), negative.strip(), line


def read_settings(line: str) -> dict[str, str]:
    """Return the settings by their name; of two with one name, the first."""
    settings: dict[str, str] = {}
    for name, value in _VALUE.findall(line):
        settings.setdefault(name, _unquoted(value.strip()))
    return settings


def _unquoted(value: str) -> str:
    if not value.startswith('"'):
        return value
    try:
        return str(json.loads(value))
    except ValueError:
        return value
