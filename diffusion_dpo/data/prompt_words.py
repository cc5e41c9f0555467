"""What a text encoder will not take as it was meant: prompts that it cuts, and the syntax of other programs."""

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from heapq import nlargest
from itertools import islice
from typing import TYPE_CHECKING, Any

from diffusion_dpo.console import warn

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

_SYNTAX = {
    "weights such as (word:1.2)": re.compile(
        # two brackets or a number: one pair alone is also what a text has, and \( is a bracket of the text
        r"(?<!\\)\([^()\n]+:\s*-?\d*\.?\d+\s*\)|(?<!\\)\(\([^()]*\)\)|(?<!\\)\{\{[^{}]*\}\}|(?<!\\)\[\[[^\[\]]*\]\]"
    ),
    "<lora:...> tags": re.compile(r"<(lora|lyco|hypernet)\s*:[^<>]+>", re.IGNORECASE),
    "BREAK": re.compile(r"(?<!\w)BREAK(?!\w)"),
    "alternatives such as [a|b] or [a:b:0.5]": re.compile(
        r"(?<!\\)\[[^\[\]]*\|[^\[\]]*\]|(?<!\\)\[[^\[\]]*:\s*\d*\.?\d+\s*\]|(?<!\\)\{[^{}]*\|[^{}]*\}"
    ),
    "embedding:... names": re.compile(r"(?<!\w)embedding:\S"),
    "__wildcards__": re.compile(r"(?<!\w)__[\w/-]+__(?!\w)"),
}
_MAYBE = re.compile(r"[(<\[{]|BREAK|embedding:|__")
_ENCODED_AT_ONCE = 1024
_LONGEST_SHOWN = 3
_SHOWN_CHARACTERS = 60

Encode = Callable[[list[str]], Sequence[Sequence[int]]]
"""Returns the tokens of prompts, start and end among them, however many they are."""


class Told:
    """What is said of prompts once, though several models draw them."""

    def __init__(self) -> None:
        self._said: set[str] = set()

    def of_syntax(self, prompts: Iterable[str]) -> None:
        """Say how many are in the syntax of other programs."""
        self.once(describe_syntax(prompts))

    def of_cuts(self, pipeline: "DiffusionPipeline", prompts: Iterable[str]) -> None:
        """Say how many are cut by a pipeline."""
        self.once(find_pipeline_cuts(pipeline, prompts).describe())

    def once(self, text: str) -> None:
        """Say a text, unless it is empty or was said before."""
        if text and text not in self._said:
            self._said.add(text)
            warn(text)


def describe_syntax(prompts: Iterable[str]) -> str:
    """Say how many of the prompts, each of which comes once, are in the syntax of other programs; "" when none is."""
    kinds: Counter[str] = Counter()
    first, num_found, total = "", 0, 0
    for prompt in prompts:
        total += 1
        if not _MAYBE.search(prompt):
            continue
        found = [name for name, pattern in _SYNTAX.items() if pattern.search(prompt)]
        kinds.update(found)
        if found:
            num_found += 1
            first = first or prompt
    if not num_found:
        return ""
    listed = ", ".join(f"{name} ({number})" for name, number in kinds.most_common())
    return (
        f"{num_found} of {total} prompts are in the syntax of A1111 or ComfyUI: {listed}; it is taken literally, as "
        f"text, first in {_shown(first)}"
    )


@dataclass
class Cuts:
    """How prompts fit into what a text encoder reads."""

    limit: int
    """Tokens that it reads, start and end among them."""
    total: int = 0
    num_cut: int = 0
    longest: list[tuple[int, str]] = field(default_factory=list)
    """Of the longest prompts, the tokens and the prompt, the longest first."""
    kept: dict[int, int] = field(default_factory=dict)
    """A hash of what is left, by the hash of a prompt that fills the limit: where equal, one prompt to the model."""

    def describe(self, where: Callable[[str], str] = lambda prompt: "") -> str:
        """Say how many prompts are cut, `where` the longest are, and how many become the same; "" when none is cut."""
        if not self.num_cut:
            return ""
        places = [(number, where(prompt)) for number, prompt in self.longest if number > self.limit]
        listed = ", ".join(f"{number} ({place})" if place else str(number) for number, place in places)
        same = sum(number for number in Counter(self.kept.values()).values() if number > 1)
        return (
            f"{self.num_cut} of {self.total} prompts are cut, since the text encoder reads {self.limit} tokens; the "
            f"longest have {listed}, first {_shown(self.longest[0][1])}"
            + (f"; {same} of them become the same as another" if same else "")
        )

    def num_shared(self, some: Iterable[str], others: Iterable[str]) -> int:
        """Return how many of some prompts are the same to the model as one of the others, and read differently."""
        theirs = {self.kept[key] for key in map(_hash, others) if key in self.kept}
        return sum(self.kept.get(_hash(prompt)) in theirs for prompt in some)


def find_cuts(prompts: Iterable[str], limit: int, encode: Encode) -> Cuts:
    """Return which of the prompts, each of which comes once, have more tokens than the limit."""
    cuts = Cuts(limit)
    waiting = _long(prompts, cuts)
    while portion := list(islice(waiting, _ENCODED_AT_ONCE)):
        for prompt, tokens in zip(portion, encode(portion), strict=True):
            cuts.num_cut += len(tokens) > limit
            cuts.longest = nlargest(_LONGEST_SHOWN, [*cuts.longest, (len(tokens), prompt)])
            if len(tokens) >= limit:
                cuts.kept[_hash(prompt)] = _hash(repr(list(tokens[: limit - 1])))
    return cuts


def find_pipeline_cuts(pipeline: "DiffusionPipeline | None", prompts: Iterable[str]) -> Cuts:
    """Return which prompts a pipeline cuts; none of a model of somebody's own, which has no tokenizer that is known.

    The two tokenizers of SDXL differ in what fills the rest alone: one stands for both.
    """
    tokenizer: Any = getattr(pipeline, "tokenizer", None)
    if tokenizer is None:
        return Cuts(0)

    def encode(texts: list[str]) -> Sequence[Sequence[int]]:
        found: Sequence[Sequence[int]] = tokenizer(texts, truncation=False, verbose=False).input_ids
        return found

    return find_cuts(prompts, int(tokenizer.model_max_length), encode)


def _long(prompts: Iterable[str], cuts: Cuts) -> Iterator[str]:
    """Yield the prompts that may fill the limit: a token is a byte at least, and most are shorter."""
    for prompt in prompts:
        cuts.total += 1
        if len(prompt.encode(errors="replace")) > cuts.limit - 3:
            yield prompt


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode(errors="surrogatepass")).digest()[:8], "big")


def _shown(prompt: str) -> str:
    text = " ".join(prompt.split())
    return repr(text if len(text) <= _SHOWN_CHARACTERS else text[:_SHOWN_CHARACTERS].rstrip() + " ...")
