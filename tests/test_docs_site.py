"""The documents as people follow them: the first hour's commands run, one after the other, and the site is built."""

import logging
import shlex
from pathlib import Path

import pytest

from diffusion_dpo.cli import main
from tests.test_readme import ROOT, blocks

FEWER = {"num_prompts": "16", "num_images_per_prompt": "6", "max_steps": "4", "sampling.num_inference_steps": "8"}
"""What the test has less of than the text, to be done within a minute."""


def shortened(words: list[str]) -> list[str]:
    """A command with smaller numbers; where the text leaves a number to its default, too."""
    kept = [f"{key}={FEWER[key]}" if (key := word.partition("=")[0]) in FEWER else word for word in words]
    if words[0] in ("generate", "compare"):
        kept.append("sampling.num_inference_steps=8")
    return kept


@pytest.mark.slow
def test_the_first_hours_commands_run_one_after_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    lines = [line for block in blocks(ROOT / "docs" / "first-hour.md", "sh") for line in block.splitlines()]
    verbs = [shlex.split(line)[1] for line in lines]
    assert verbs == ["doctor", "generate", "score", "pair", "inspect", "train", "report", "compare"]
    for line in lines:
        program, *words = shlex.split(line)
        assert program == "diffusion-dpo"
        assert main(shortened(words)) == 0, line
    assert "next: " in capsys.readouterr().out
    for made in ("runs/train/report.html", "runs/compare/report.html", "runs/compare/report.json"):
        assert (tmp_path / made).exists()


def test_the_site_builds_without_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    monkeypatch.setenv("NO_MKDOCS_2_WARNING", "1")
    messages: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("mkdocs").addHandler(handler)
    try:
        build(load_config(str(ROOT / "mkdocs.yml"), site_dir=str(tmp_path), strict=False))
    finally:
        logging.getLogger("mkdocs").removeHandler(handler)
    assert not messages
    page = (tmp_path / "first-hour" / "index.html").read_text(encoding="utf-8")
    assert "fonts.googleapis" not in page and "The first hour" in page


def test_every_document_is_in_the_sites_navigation() -> None:
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    for path in (ROOT / "docs").rglob("*.md"):
        assert path.relative_to(ROOT / "docs").as_posix() in text, path
