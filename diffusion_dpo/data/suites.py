"""Prompt suites by name: downloaded once from where their authors keep them, and checked.

PartiPrompts (Yu et al. 2022, arXiv 2206.10789), GenEval (Ghosh et al. 2023, arXiv 2310.11513) and the benchmark of
HPSv2 (Wu et al. 2023, arXiv 2306.09341). The first two are pinned to a commit and a hash; the third is on the hub.
"""

import hashlib
import os
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from diffusion_dpo.config import ConfigError
from diffusion_dpo.console import say
from diffusion_dpo.files import atomic_path

_GITHUB = "https://raw.githubusercontent.com"
_MOST_BYTES = 10_000_000
_TIMEOUT_SECONDS = 60


@dataclass(frozen=True)
class Suite:
    """Where a suite's file is, below raw.githubusercontent.com, and the hash of what is there."""

    path: str
    sha256: str


SUITES: dict[str, Suite | None] = {
    "parti": Suite(
        "google-research/parti/5a657978134374ce28973948331b319adef164bd/PartiPrompts.tsv",
        "fab29e41bb512a169b56acab4cf2a41dcb675e285df2efcde6640c7dd3c440eb",
    ),
    "geneval": Suite(
        "djghosh13/geneval/af4902f24d3ca90ebbb446dd9891a59e0f82725f/prompts/evaluation_metadata.jsonl",
        "5c48e0813e812e3c373fa5c8ed07a8f0a483be30272b4427b0559c8048e67c13",
    ),
    "hpsv2": None,
}
"""The suites that go by a name; hpsv2 comes through huggingface_hub."""
_HPSV2_STYLES = ("anime", "concept-art", "paintings", "photo")


def suite_files(name: str, *, host: str = _GITHUB) -> list[Path]:
    """Return a suite's files, downloaded if they are not there yet; raises ConfigError when they cannot be had."""
    suite = SUITES[name]
    if suite is None:
        return [_from_hub(name, f"{style}.json") for style in _HPSV2_STYLES]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "diffusion-dpo" / "suites"
    file = cache / f"{name}{Path(suite.path).suffix}"
    if file.exists() and hashlib.sha256(file.read_bytes()).hexdigest() == suite.sha256:
        return [file]
    url = f"{host}/{suite.path}"
    by_hand = f"download it elsewhere, and give prompts_path the file, or put it at {file}"
    try:
        with urllib.request.urlopen(url, timeout=_TIMEOUT_SECONDS) as answer:
            data = answer.read(_MOST_BYTES)
    except (OSError, urllib.error.URLError) as error:
        raise ConfigError(f"cannot download the suite {name} from {url}: {error}; {by_hand}") from None
    if hashlib.sha256(data).hexdigest() != suite.sha256:
        raise ConfigError(f"what {url} holds is not the suite {name} as it is known here; {by_hand}")
    cache.mkdir(parents=True, exist_ok=True)
    with atomic_path(file) as partial:
        partial.write_bytes(data)
    say(f"suite {name}: {file}")
    return [file]


def _from_hub(name: str, file: str) -> Path:
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download("zhwang/HPDv2", f"benchmark/{file}", repo_type="dataset"))
    except (OSError, ValueError) as error:  # what huggingface_hub raises is an OSError
        raise ConfigError(
            f"cannot get the suite {name} from the hub (zhwang/HPDv2): {' '.join(str(error).split())[:200]}; give "
            "prompts_path its .json instead"
        ) from None
