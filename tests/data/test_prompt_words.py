"""Prompts that are cut or meant for other programs: what is counted, and what is left alone."""

import open_clip
import pytest

from diffusion_dpo.data.clip_tokens import CLIP_LIMIT, clip_tokens
from diffusion_dpo.data.prompt_words import describe_syntax, find_cuts


@pytest.mark.parametrize(
    ("prompt", "kind"),
    [
        ("a (red:1.3) circle", "weights"),
        ("a (red, shiny: .8) circle", "weights"),
        ("((masterpiece)), a circle", "weights"),
        ("{{masterpiece}}, a circle", "weights"),
        ("a circle <lora:add_detail-XL:0.7>", "<lora"),
        ("a circle <LoRA:x:1:0.5>", "<lora"),
        ("a circle BREAK a square", "BREAK"),
        ("a [red|blue] circle", "alternatives"),
        ("a [red:blue:0.5] circle", "alternatives"),
        ("a {red|blue} circle", "alternatives"),
        ("a circle, embedding:easynegative", "embedding"),
        ("a __colour__ circle", "wildcards"),
    ],
)
def test_the_syntax_of_other_programs_is_counted(prompt: str, kind: str):
    said = describe_syntax([prompt, "a circle"])
    assert said.startswith("1 of 2 prompts are in the syntax of A1111 or ComfyUI: ")
    assert kind in said
    assert said.endswith(f"taken literally, as text, first in {prompt!r}")


@pytest.mark.parametrize(
    "prompt",
    [
        "a poster of a film (2019)",
        r"hatsune miku \\(vocaloid\\), smile",
        r"a sign that says \\(a:1.5\\)",
        "a clock (at 10:30 in the morning)",
        "a list [1], in brackets",
        "a smiley :) (or two) <3",
        "a wave that breaks, breakfast, BREAKING NEWS",
        "if a < b and c > d, x__y",
        "Lora, a woman; ratio 16:9",
    ],
)
def test_what_is_text_is_not_syntax(prompt: str):
    assert describe_syntax([prompt.replace("\\\\", "\\")]) == ""


def characters(prompts: list[str]) -> list[list[int]]:
    """Return a start token, one token a character, and an end token."""
    return [[0, *map(ord, prompt), 1] for prompt in prompts]


def test_prompts_that_are_cut_are_counted_and_those_that_become_the_same():
    prompts = ["abcdefgh", "abcdefghi", "abcdefghij", "abc", "xyzxyzxyz", "abcdefg"]
    cuts = find_cuts(prompts, 9, characters)
    assert (cuts.total, cuts.num_cut, cuts.longest[0]) == (6, 4, (12, "abcdefghij"))
    # `abcdefg` fills the limit exactly: nothing of it is lost, and three others become it
    assert cuts.describe({it: f"line {number}" for number, it in enumerate(prompts)}.__getitem__) == (
        "4 of 6 prompts are cut, since the text encoder reads 9 tokens; the longest have 12 (line 2), 11 (line 4), "
        "11 (line 1), first 'abcdefghij'; 4 of them become the same as another"
    )
    assert cuts.num_shared(["abcdefghi", "xyzxyzxyz", "abc"], ["abcdefg", "abc"]) == 1
    assert find_cuts(["abc", "abcdefg"], 9, characters).describe() == ""


def test_the_tokens_of_clip_are_those_of_open_clip():
    texts = ["a photo of a cat, it's 2019's best (masterpiece:1.2) !!!", "1girl, 8k UHD, don't  we'll\nHDR-photo"]
    texts += ["\u4e2d\u6587 \U0001f600 caf\xe9", "word " * 100, "x" * 300]
    theirs = open_clip.tokenizer.SimpleTokenizer()
    assert [tokens[1:-1] for tokens in clip_tokens(texts)] == [theirs.encode(text) for text in texts]
    cuts = find_cuts(["word " * 75, "word " * 76, "word " * 77], CLIP_LIMIT, clip_tokens)
    assert (cuts.num_cut, len(set(cuts.kept.values()))) == (2, 1)
