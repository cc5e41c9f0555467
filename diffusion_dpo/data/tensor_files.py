"""Safetensors files that know what they hold: facts in words, and a checksum of every item, looked at when it is read.

Any reader of safetensors opens them. Ours reads single items by position and maps nothing, so that what was read is
not counted as the process's memory, and a handle works on both sides of a fork.
"""

import json
import math
import os
import weakref
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

_CHECKSUMS = "crc32 of "
_DTYPES = {"F32": np.float32, "F16": np.float16, "I64": np.int64}
_HEADER_LIMIT = 100_000_000
"""Bytes; that of safetensors itself."""


class DamagedFile(ValueError):  # noqa: N818 - it names the file's state
    """A file that is not as it was written; the message says how."""


def write(
    path: Path, tensors: "Mapping[str, Tensor]", num_index_dims: Mapping[str, int], facts: Mapping[str, str]
) -> None:
    """Write tensors of float32 or float16; what is read and checked as one is `tensor[index]`.

    `num_index_dims` says of every tensor how many numbers such an index has.
    """
    import torch
    from safetensors.torch import save_file

    content: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        shape = tensor.shape[: num_index_dims[name]]
        items = tensor.contiguous().numpy().reshape(math.prod(shape), -1)
        checksums = [zlib.crc32(item.data) for item in items]
        content[name] = tensor.contiguous()
        content[_CHECKSUMS + name] = torch.tensor(checksums, dtype=torch.int64).view(shape)
    # One entry, because safetensors writes several in any order, and equal content should be equal bytes.
    save_file(content, path, metadata={"facts": json.dumps(facts)})


class TensorFile:
    """An open file, until the last reference to it is gone."""

    def __init__(self, path: Path) -> None:
        """Open a file, reading its header only; raises DamagedFile, and OSError when it cannot be opened."""
        self._handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        weakref.finalize(self, os.close, self._handle)
        size = int.from_bytes(self._read(0, 8), "little")
        if size > _HEADER_LIMIT:
            raise DamagedFile("its header is damaged")
        try:
            header = json.loads(self._read(8, size))
            self.facts: dict[str, str] = dict(json.loads(header.pop("__metadata__")["facts"]))
            self._tensors = {name: _place(it, 8 + size) for name, it in header.items()}
            end = 8 + size + max((it["data_offsets"][1] for it in header.values()), default=0)
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise DamagedFile("its header is damaged") from error
        actual = os.fstat(self._handle).st_size
        if actual != end:
            raise DamagedFile(f"it has {actual} of {end} bytes")

    @property
    def names(self) -> list[str]:
        """The names of the tensors."""
        return [name for name in self._tensors if not name.startswith(_CHECKSUMS)]

    def item(self, name: str, *index: int) -> "Tensor":
        """Return one item of a tensor; raises DamagedFile when its bytes are not those that were written."""
        import torch

        data = self._item_bytes(name, index)
        if zlib.crc32(data) != int.from_bytes(self._item_bytes(_CHECKSUMS + name, index), "little"):
            raise DamagedFile("its checksum is wrong")
        dtype, shape, _ = self._tensors[name]
        return torch.from_numpy(np.frombuffer(data, dtype).reshape(shape[len(index) :]))

    def _item_bytes(self, name: str, index: Sequence[int]) -> bytearray:
        if name not in self._tensors:
            raise DamagedFile(f"it lacks {name!r}")
        dtype, shape, offset = self._tensors[name]
        if len(shape) < len(index):
            raise DamagedFile(f"{name!r} has too few dimensions")
        position = 0
        for i, length in zip(index, shape, strict=False):
            if i >= length:
                raise DamagedFile(f"{name!r} is too short")
            position = position * length + i
        size = dtype.itemsize * math.prod(shape[len(index) :])
        return self._read(offset + position * size, size)

    def _read(self, offset: int, size: int) -> bytearray:
        data = bytearray(size)
        if os.preadv(self._handle, [data], offset) != size:
            raise DamagedFile("it ends too early")
        return data


def _place(entry: dict[str, Any], start: int) -> tuple[np.dtype[Any], tuple[int, ...], int]:
    """Return the type, the shape and the offset of a tensor from its entry in a header; raises ValueError."""
    dtype, shape = np.dtype(_DTYPES[entry["dtype"]]), tuple(entry["shape"])
    first, end = entry["data_offsets"]
    if end - first != math.prod(shape) * dtype.itemsize or first < 0:
        raise ValueError("its size is not that of its shape")
    return dtype, shape, start + first
