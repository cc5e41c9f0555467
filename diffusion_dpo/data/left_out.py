"""The files of a folder that are read neither as images nor as captions: counted by kind, and named."""

import re
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from posixpath import basename, splitext

from diffusion_dpo.data.captions import Captions
from diffusion_dpo.data.image_kinds import NOT_DECODED
from diffusion_dpo.data.listing import Listing, some

_OWN = re.compile(
    r"scores-.*\.(json|parquet)|manifest\.json|thumbs\.db|desktop\.ini|state\.json|dataset_(info|dict)\.json|\d+_stats\.json",
    re.IGNORECASE,
)
"""Files that are no one's images: what `score`, file managers, `datasets` and img2dataset write beside them."""


def is_own(name: str) -> bool:
    """Whether a file is one that a program writes beside images and that holds none."""
    return _OWN.fullmatch(basename(name)) is not None


def sort_out(listing: Listing, used: Collection[str], captions: Captions) -> dict[str, list[str]]:
    """Return the names of the files that nobody reads, by kind, where `used` are the images and tables that are."""
    found: dict[str, list[str]] = defaultdict(list)
    used = set(used)
    stems = {splitext(name)[0] for name in used}
    for name in listing.files:
        is_beside = captions.is_caption(name) and splitext(name)[0] in stems
        if name not in used and not is_beside and name not in captions.sources and not is_own(name):
            found[_kind(name)].append(name)
    links = [name for name in listing.links if not (captions.is_caption(name) and splitext(name)[0] in stems)]
    if links:
        found["links out of the folder or to a folder, which are not followed"] = links
    return dict(found)


def describe(left_out: Mapping[str, Sequence[str]]) -> str:
    """Return `3 x .heic, which ... (a.heic, b.heic, ...); 1 x .mp4 (c.mp4)`."""
    return "; ".join(f"{len(names)} x {kind} ({some(names)})" for kind, names in left_out.items())


def _kind(name: str) -> str:
    suffix = splitext(name)[1].lower()
    if suffix in NOT_DECODED:
        return f"{suffix}, which is not decoded here (convert it to PNG or JPEG)"
    if suffix == ".parquet":
        return ".parquet without images"
    return suffix or "files without a suffix"
