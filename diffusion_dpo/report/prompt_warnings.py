"""Prompts that a text encoder will not take as they were meant, for the page of `inspect`."""

from collections.abc import Mapping

from diffusion_dpo.data.clip_tokens import CLIP_LIMIT, clip_tokens
from diffusion_dpo.data.prompt_words import describe_syntax, find_cuts


def prompt_warnings(places: Mapping[str, str]) -> list[str]:
    """Return a sentence on prompts in the syntax of other programs, and one on those that CLIP cuts.

    `places` says where each prompt first is.
    """
    cut = find_cuts(places, CLIP_LIMIT, clip_tokens).describe(places.__getitem__)
    return [it for it in (describe_syntax(places), cut and f"by the tokenizer of CLIP, {cut}") if it]
