"""Files that somebody else's rows name: read only inside the folders that the user gave, whatever links there are."""

from collections.abc import Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

MISSING = "no such file"
_LEAVES = "the file name leaves the folder"
_LINK = " leaves the folder: a link"


def read_inside(folder: Path, name: Any, *, also: Sequence[Path] = ()) -> bytes | str:
    """Return the bytes of a file inside a folder, or why there are none.

    Links are followed only where they end inside the folder or inside one of the folders `also`. A name with
    backslashes that is no file's is tried with slashes, as Windows meant it.
    """
    if not isinstance(name, str) or not name or "\0" in name:
        return "not a file name"
    if "://" in name or name.startswith("file:"):
        return "a URL instead of a file name"
    windows = PureWindowsPath(name)
    if name.startswith("/") or windows.drive or windows.root or ".." in {*PurePosixPath(name).parts, *windows.parts}:
        return _LEAVES
    found = _read(folder, name, also)
    return _read(folder, windows.as_posix(), also) if found == MISSING and "\\" in name else found


def advise(fault: str) -> str:
    """Return why a file of a data set could not be read, with what to do about a link."""
    return f"{fault}; copy what it leads to, or set data.images_dir to it" if fault.endswith(_LINK) else fault


def _read(folder: Path, name: str, also: Sequence[Path]) -> bytes | str:
    try:
        file = (folder / name).resolve()
        if not any(file.is_relative_to(it.resolve()) for it in (folder, *also)):
            return f"{_link(folder, name)}{_LINK}"
        return file.read_bytes() if file.is_file() else MISSING
    except (OSError, RuntimeError, UnicodeEncodeError):  # RuntimeError: a loop of links
        return "the file cannot be read"


def _link(folder: Path, name: str) -> str:
    """Return the folder of a name that is a link; without one, the file itself is."""
    parts = PurePosixPath(name).parts[:-1]
    upper = [PurePosixPath(*parts[: i + 1]) for i in range(len(parts))]
    linked = next((part for part in upper if (folder / part).is_symlink()), None)
    return "the file" if linked is None else f"{linked}/"
