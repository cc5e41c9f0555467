"""Prompt suites by name: downloaded once from where their authors keep them, and checked.

PartiPrompts (Yu et al. 2022, arXiv 2206.10789), GenEval (Ghosh et al. 2023, arXiv 2310.11513) and the benchmark of
HPSv2 (Wu et al. 2023, arXiv 2306.09341). The first two are pinned to a commit and a hash; the third is on the hub.
"""

import hashlib
import os
import urllib.request
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path

from diffusion_dpo.config import ConfigError
from diffusion_dpo.console import say
from diffusion_dpo.files import atomic_path
from diffusion_dpo.web import HttpError, TooLargeError, fetch

_GITHUB = "https://raw.githubusercontent.com"
_MOST_BYTES = 10_000_000
"""More than that is not read: the largest suite has 120 kB."""
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
_HPSV2_HUB = "zhwang/HPDv2"  # where the authors' own package takes it from
_HPSV2_STYLES = ("anime", "concept-art", "paintings", "photo")


def suite_files(name: str, *, host: str = _GITHUB) -> list[Path]:
    """Return a suite's files, downloaded if they are not there yet; raises ConfigError when they cannot be had."""
    suite = SUITES[name]
    if suite is None:
        files = [_from_hub(name, f"{style}.json") for style in _HPSV2_STYLES]
        say(f"suite {name} is not pinned; now {_HPSV2_HUB} at {files[0].parents[1].name}")
        return files
    file = _cache() / f"{name}{Path(suite.path).suffix}"
    url = f"{host}/{suite.path}"
    by_hand = f"download it elsewhere, and give prompts_path the file, or put it at {file}"
    try:
        if file.is_file() and hashlib.sha256(file.read_bytes()).hexdigest() == suite.sha256:
            return [file]
        data = _download(url)
    except (OSError, HTTPException, HttpError, TooLargeError) as error:
        said = " ".join(str(error).split())[:200] or type(error).__name__
        raise ConfigError(f"cannot download the suite {name} from {url}: {said}; {by_hand}") from None
    if hashlib.sha256(data).hexdigest() != suite.sha256:
        raise ConfigError(f"what {url} holds is not the suite {name} as it is known here; {by_hand}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(file) as partial:
            partial.write_bytes(data)
    except OSError as error:
        raise ConfigError(
            f"cannot keep the suite {name} in {file.parent}: {error.strerror}; set XDG_CACHE_HOME to a folder that "
            f"can be written to, or download {url} and give prompts_path the file"
        ) from None
    say(f"suite {name}: {file}")
    return [file]


def _cache() -> Path:
    """Return the folder of suites in the user's cache; by the XDG specification a relative one does not count."""
    given = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (given if given.is_absolute() else Path.home() / ".cache") / "diffusion-dpo" / "suites"


def _download(url: str) -> bytes:
    """Return a body that came whole and in time."""
    request = urllib.request.Request(url)
    return fetch(request, timeout_seconds=_TIMEOUT_SECONDS, max_bytes=_MOST_BYTES, follow_redirects=True)


def _from_hub(name: str, file: str) -> Path:
    from huggingface_hub import errors, hf_hub_download

    try:
        return Path(hf_hub_download(_HPSV2_HUB, f"benchmark/{file}", repo_type="dataset"))
    except (OSError, errors.HTTPError, errors.HFValidationError) as error:
        raise ConfigError(
            f"cannot get the suite {name} from the hub ({_HPSV2_HUB}): {' '.join(str(error).split())[:200]}; give "
            "prompts_path its .json instead"
        ) from None
