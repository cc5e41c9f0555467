"""report.md and the plots: text is only text, tables are whole, and the plots that are named are there."""

from pathlib import Path

import pytest
from PIL import Image

from diffusion_dpo.report.markdown import escape, headline_table, render_markdown
from diffusion_dpo.report.plots import write_plots
from tests.browser import HOSTILE
from tests.report.comparison import make_comparison


@pytest.mark.parametrize(
    "text", [*HOSTILE, "a|b", "line\nbreak", "[x](https://y.example)", "1. one", "# title", "`a`"]
)
def test_text_stays_text(text: str) -> None:
    made = escape(text)
    assert "<" not in made and "\n" not in made and len(made) < 1500
    for special in "|`[]#*_":
        assert made.count(special) == made.count(f"\\{special}")
    assert not made.startswith("1.")


def test_the_table_has_the_main_metrics_and_equal_rows() -> None:
    report, _, _ = make_comparison(models=("tuned", "other"))
    lines = headline_table(report, "other").splitlines()
    assert [line.split(" | ")[0] for line in lines] == ["| Metric", "| ---", "| lpips \\(lower is better\\)", "| clip"]
    assert {line.count("|") for line in lines} == {9}
    assert "other" in lines[0] and "held out" in lines[2] and "trained on" in lines[3]


def test_report_md_says_what_the_page_says_and_shows_the_plots(tmp_path: Path) -> None:
    report, scores, _ = make_comparison(models=("tuned", "other"))
    plots = write_plots(tmp_path / "plots", report, scores)
    text = render_markdown(report, plots)
    assert text.startswith("## On 30 prompts with tuned, lpips ")
    assert "**The images of a prompt differ less than the baseline's: variety was lost.**" in text
    assert "3 of 30 prompts were in the training pairs" in text and "Wilcoxon" in text
    for plot in plots:
        assert f"](plots/{plot.name})" in text
        with Image.open(plot) as image:
            assert image.format == "PNG" and image.width > 800 and not image.info.keys() & {"Software", "Date"}


def test_plots_that_no_longer_apply_go(tmp_path: Path) -> None:
    report, scores, _ = make_comparison(models=("tuned", "other"))
    assert [it.name for it in write_plots(tmp_path, report, scores)] == [
        "metrics.png",
        "histogram.png",
        "categories.png",
        "models.png",
    ]
    (tmp_path / "mine.png").write_bytes(b"mine")
    one = report.model_copy(
        update={
            "models": report.models[:1],
            "results": tuple(it for it in report.results if it.model == "tuned" and not it.category),
        }
    )
    write_plots(tmp_path, one, scores)
    assert sorted(it.name for it in tmp_path.iterdir()) == ["histogram.png", "metrics.png", "mine.png"]
