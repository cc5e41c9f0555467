"""The tokens of CLIP (arXiv 2103.00020), as Stable Diffusion counts them, without loading a model or torch.

The vocabulary is the file that open_clip carries.
"""

import gzip
import importlib.util
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers import Tokenizer

CLIP_LIMIT = 77
"""Tokens that CLIP reads, start and end among them."""
_NUM_MERGES = 49152 - 256 - 2
_PATTERN = r"""<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"""


def clip_tokens(prompts: list[str]) -> Sequence[Sequence[int]]:
    """Return the tokens of prompts, with start and end, uncut."""
    return [
        encoding.ids for encoding in _tokenizer().encode_batch([f"<|startoftext|>{it}<|endoftext|>" for it in prompts])
    ]


@lru_cache(maxsize=1)
def _tokenizer() -> "Tokenizer":
    from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers
    from tokenizers.models import BPE

    spec = importlib.util.find_spec("open_clip")
    assert spec is not None and spec.submodule_search_locations, "open_clip is a dependency"
    file = Path(spec.submodule_search_locations[0]) / "bpe_simple_vocab_16e6.txt.gz"
    lines = gzip.decompress(file.read_bytes()).decode().split("\n")[1 : _NUM_MERGES + 1]
    merges = [(first, second) for first, second in (line.split() for line in lines)]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*letters, *(f"{it}</w>" for it in letters), *map("".join, merges), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {word: number for number, word in enumerate(dict.fromkeys(words))}
    tokenizer = Tokenizer(BPE(vocabulary, merges, end_of_word_suffix="</w>"))
    tokenizer.add_special_tokens(["<|startoftext|>", "<|endoftext|>"])
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PATTERN), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return tokenizer
