"""What is read in a model's answer, and which images of a prompt are compared."""

import json

import pytest

from diffusion_dpo.scorers.vlm_judge import choose_rivals, parse_points, parse_verdict


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Image A is better.",
        "A",
        '"A"',
        "The verdict is: A",
        '{"verdict": "C"}',
        '{"verdict": "A or B"}',
        '{"verdict": null}',
        '{"verdict": ["A"]}',
        '{"verdict": 1}',
        '{"winner": "A"}',
        '{"verdict": "A"} no, {"verdict": "B"}',
        '{"verdict": "A"',
        '{"answer": {"verdict": "A"}}',
        "I'm sorry, I can't compare these images. A verdict cannot be given.",
        "{" * 5000,
        '{"a":' * 5000,
        '{"verdict": "A"}' + " " * 30_000,
    ],
)
def test_what_is_no_verdict(text: str) -> None:
    assert parse_verdict(text) is None


@pytest.mark.parametrize("verdict", ["A", "B", "tie"])
@pytest.mark.parametrize(
    "frame",
    [
        "%s",
        "```json\n%s\n```",
        "Image A or B? {Well}. %s",
        "%s\nI say B, and A.",
        'not {"a": 1} but %s',
        "<think>%s</think>%s",
    ],
)
def test_a_verdict_in_a_frame(verdict: str, frame: str) -> None:
    text = json.dumps({"reason": 'A {"verdict": "B"} in a text', "verdict": verdict}, indent=1)
    assert parse_verdict(frame.replace("%s", text)) == verdict


@pytest.mark.parametrize(
    "text, points",
    [
        ('{"points": 7}', 7),
        ('```\n{"points": 10}\n```', 10),
        ('{"points": 7.5}', None),
        ('{"points": 0}', None),
        ('{"points": 11}', None),
        ('{"points": "7"}', None),
        ('{"points": true}', None),
        ('{"points": 1} {"points": 2}', None),
        ("7", None),
        ("7/10", None),
    ],
)
def test_points(text: str, points: int | None) -> None:
    assert parse_points(text) == points


@pytest.mark.parametrize("limit", [None, 2, 3, 4, 5, 7])
@pytest.mark.parametrize("size", range(1, 10))
def test_whom_i_am_compared_with_is_compared_with_me(size: int, limit: int | None) -> None:
    ring = [str(i) for i in range(size)]
    chosen = {one: choose_rivals(one, ring[:i] + ring[i + 1 :], limit) for i, one in enumerate(ring)}
    wanted = min(size - 1, limit or size)
    for one, others in chosen.items():
        assert one not in others and len(set(others)) == len(others)
        assert len(others) == wanted or (wanted % 2 and size % 2 and len(others) == wanted - 1)
        assert all(one in chosen[other] for other in others)
