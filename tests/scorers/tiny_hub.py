"""A model in the cache of the Hugging Face hub."""

import hashlib
import os
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def put_on_hub(cache: Path, files: dict[str, bytes]) -> Path:
    """Lay out the model org/name as the hub's client does: links in `snapshots` to blobs named by their content."""
    home = cache / "models--org--name"
    snapshot = home / "snapshots" / COMMIT
    for folder in (snapshot, home / "blobs", home / "refs"):
        folder.mkdir(parents=True, exist_ok=True)
    (home / "refs" / "main").write_text(COMMIT)
    for name, data in files.items():
        digest = hashlib.sha256(data) if name.endswith((".safetensors", ".bin", ".pt")) else hashlib.sha1(data)
        blob = home / "blobs" / digest.hexdigest()
        blob.write_bytes(data)
        (snapshot / name).symlink_to(os.path.relpath(blob, snapshot))
    return snapshot
