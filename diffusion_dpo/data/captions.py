"""The prompts that lie beside images: in metadata of the folder, in a text file or a JSON file of an image's name."""

import json
import re
from posixpath import dirname, join, splitext
from typing import Any

from diffusion_dpo.data import columns
from diffusion_dpo.data.embedded import Embedded, read_caption
from diffusion_dpo.data.inside import read_inside
from diffusion_dpo.data.listing import Listing
from diffusion_dpo.data.records import read_rows
from diffusion_dpo.data.tables import prompt_value, text_column
from diffusion_dpo.data.text import decode_text

CAPTION_SUFFIXES = (".txt", ".caption")
_METADATA = re.compile(r"(metadata|meta|captions|prompts)\.(jsonl|json|csv|tsv|parquet)")
"""The names of files that hold the prompts of many images."""
FILE_NAMES = ("file_name", "image_file_name", "file", "filename", "image")
"""Columns that name an image; the first is the standard of Hugging Face's image folders."""


class Captions:
    """What a folder says of its images, apart from the images themselves."""

    def __init__(self, listing: Listing, prompt_column: str | None = None) -> None:
        self.root = listing.root
        self._column = prompt_column
        beside = (*CAPTION_SUFFIXES, ".json")
        self._files = {name for name in (*listing.files, *listing.links) if name.endswith(beside)}
        self._metadata: dict[str, Embedded] = {}
        self.sources: set[str] = set()
        """The files with prompts of many images."""
        for name in listing.files:
            if _METADATA.fullmatch(name.rpartition("/")[2]) and self._read_metadata(name):
                self.sources.add(name)

    def of(self, image: str) -> Embedded | None:
        """Return what is said of an image, or why that cannot be read; None where nothing is said.

        Metadata come before a text file, and that before a JSON file, which often holds everything but the prompt.
        """
        if image in self._metadata:
            return self._metadata[image]
        if not self._files:
            return None
        stem = splitext(image)[0]
        texts = [name for suffix in CAPTION_SUFFIXES if (name := stem + suffix) in self._files]
        if texts:
            return self._of_texts(texts)
        name = f"{stem}.json"
        return self._of_json(name) if name in self._files else None

    def is_caption(self, name: str) -> bool:
        """Whether a file may be the caption of the image that it shares its name with."""
        return name in self._files

    def _of_texts(self, names: list[str]) -> Embedded:
        found = []
        for name in names:
            data = read_inside(self.root, name)
            if isinstance(data, str):
                return Embedded(fault=f"its caption {name}: {data}")
            try:
                found.append(read_caption(decode_text(data)))
            except UnicodeDecodeError:
                return Embedded(fault=f"its caption {name} is neither UTF-8 nor UTF-16 text")
        if any(it.prompt != found[0].prompt for it in found):
            return Embedded(fault=f"different captions in {' and '.join(names)}")
        return found[0] if found[0].prompt else Embedded(fault=f"its caption {names[0]} is empty")

    def _of_json(self, name: str) -> Embedded | None:
        data = read_inside(self.root, name)
        if isinstance(data, str):
            return Embedded(fault=f"its caption {name}: {data}")
        try:
            entry = json.loads(decode_text(data))
        except (ValueError, RecursionError):
            return Embedded(fault=f"{name} beside it is not valid JSON")
        column = self._text_column(entry) if isinstance(entry, dict) else None
        return _said(entry[column], f"{name} beside it") if column else None

    def _read_metadata(self, name: str) -> bool:
        """Take the prompts of a file with metadata; return whether it has such."""
        is_used = False
        file = self.root / name
        known = (*FILE_NAMES, *columns.PROMPT, *([self._column] if self._column else []))
        for _, entry in read_rows(file, known):
            if not isinstance(entry, dict):
                continue
            key = next((it for it in FILE_NAMES if isinstance(entry.get(it), str)), "")
            column = self._text_column(entry)
            if key and column:
                self._metadata[join(dirname(name), entry[key])] = _said(entry[column], name)
                is_used = True
        return is_used

    def _text_column(self, entry: dict[str, Any]) -> str | None:
        return text_column(entry, self._column)


def _said(value: Any, where: str) -> Embedded:
    """Return what a value of a column of prompts says; a list of one text is that text."""
    prompt, fault = prompt_value(value)
    return Embedded(prompt, fault=fault and f"{fault} in {where}")
