"""The files of somebody's folder: visible ones, and no link that leads out of it is followed."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from diffusion_dpo.config import ConfigError

_NAMES_SHOWN = 3


@dataclass(frozen=True)
class Listing:
    """What lies in and below `root`; names are relative to it, with slashes, sorted folder by folder."""

    root: Path
    files: tuple[str, ...]
    links: tuple[str, ...]
    """Links that are not followed: out of the folder, to nowhere, or to a folder."""


def list_files(root: Path) -> Listing:
    """List a folder; hidden files and folders are passed over. Raises ConfigError when it cannot be listed."""
    files: list[str] = []
    links: list[str] = []
    folders = [""]
    while folders:
        folder = folders.pop()
        try:
            with os.scandir(root / folder) as entries:
                for entry in entries:
                    if entry.name.startswith(".") or entry.name == "__MACOSX":
                        continue
                    name = folder + entry.name
                    if entry.is_symlink():
                        (files if _leads_to_a_file_inside(root, name) else links).append(name)
                    elif entry.is_dir():
                        folders.append(f"{name}/")
                    else:
                        files.append(name)
        except OSError as error:
            raise ConfigError(f"cannot list {root / folder}: {error.strerror}") from None
    return Listing(root, tuple(sorted(files, key=_parts)), tuple(sorted(links, key=_parts)))


def some(names: Sequence[str]) -> str:
    """Return the first names of a list: `a, b, c, ...`."""
    return ", ".join(names[:_NAMES_SHOWN]) + (", ..." if len(names) > _NAMES_SHOWN else "")


def _leads_to_a_file_inside(root: Path, name: str) -> bool:
    try:
        target = (root / name).resolve(strict=True)
    except (OSError, RuntimeError):  # RuntimeError: a loop of links
        return False
    return target.is_file() and target.is_relative_to(root.resolve())


def _parts(name: str) -> list[str]:
    return name.split("/")
