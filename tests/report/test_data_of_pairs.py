"""What is said of pairs whose faults are known, in words and on the page."""

import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffusion_dpo.data import PreferencePair
from diffusion_dpo.data.pairs import PairsData, pair_row
from diffusion_dpo.data.rows import pair_id
from diffusion_dpo.data.shards import PAIRS, write_shard
from diffusion_dpo.files import write_json
from diffusion_dpo.report.data_of_pairs import look_at_pairs
from diffusion_dpo.report.data_page import Findings, write_page
from tests.browser import HOSTILE, Elements, needs_chromium, run_page
from tests.photos import encode


def speckle(seed: int, light: float) -> Image.Image:
    """A picture of coarse coloured noise of a mean light."""
    cells = np.clip(np.random.default_rng(seed).normal(light, 40, (8, 8, 3)), 0, 255).astype(np.uint8)
    return Image.fromarray(cells).resize((48, 48))


def pair(prompt: str, seed: int, lights: tuple[float, float], **fields: object) -> PreferencePair:
    images = [encode(speckle(2 * seed + side, light), "PNG") for side, light in enumerate(lights)]
    return PreferencePair(pair_id(prompt, *images), prompt, *images, **fields)


def many(share_brighter: float, *, amount: int = 120, prompts: int = 40) -> list[PreferencePair]:
    made = []
    for i in range(amount):
        lights = (150, 100) if i % 20 < 20 * share_brighter else (100, 150)
        origins = [{"model": name, "position": place} for name, place in (("a", i % 2), ("b", 1 - i % 2))]
        made.append(
            pair(
                f"prompt {i % prompts}",
                i,
                lights,
                margin=float(i),
                chosen_scores={"clip": 1.0 + i, "arcface_face_area": 0.5},
                rejected_scores={"clip": 1.0, "arcface_face_area": 0.5},
                chosen_origin=origins[0],
                rejected_origin=origins[1],
            )
        )
    return made


def swapped(it: PreferencePair) -> PreferencePair:
    ids = pair_id(it.prompt, it.rejected, it.chosen)
    return replace(it, pair_id=ids, chosen=it.rejected, rejected=it.chosen, chosen_scores=it.rejected_scores)


@pytest.fixture
def look(tmp_path: Path) -> Callable[..., Findings]:
    def look_at(pairs: list[PreferencePair], num_images: int = 0, labelled_by: str = "clip") -> Findings:
        write_shard(tmp_path / "pairs" / "pairs-00000.parquet", [pair_row(it) for it in pairs], PAIRS)
        write_json(tmp_path / "pairs" / "manifest.json", {"labelled_by": [labelled_by]})
        return look_at_pairs(tmp_path, PairsData(path=tmp_path / "pairs", type="pairs"), num_images)

    (tmp_path / "pairs").mkdir()
    return look_at


def predictor(found: Findings, name: str):
    return next(it for it in (*found.confounds, *found.judges) if it.name == name)


def test_brightness_that_decides_and_a_model_that_always_wins_are_warned_of(look) -> None:
    found = look(many(0.9))
    light = predictor(found, "brightness")
    assert light.auc == pytest.approx(0.9, abs=0.02) and light.is_loud
    assert predictor(found, "model (origin)").auc == 1
    assert [it.rate for it in predictor(found, "position (origin)").values] == [0.5, 0.5]
    assert any(text.startswith("chosen images are brighter in 90") for text in found.warnings)
    assert "Model, brightness and" in found.headline and "position" not in found.headline
    assert not predictor(found, "arcface_face_area").varies and predictor(found, "clip").labelled
    clean = look(many(0.5))
    assert not predictor(clean, "brightness").is_loud
    alike = look([replace(it, chosen_origin={}) for it in many(0.5)])
    assert alike.headline == "120 pairs under 40 prompts; nothing simple predicts the labels."
    few = look([replace(it, chosen_origin={}) for it in many(0.5, prompts=5)][:10])
    assert few.headline == "10 pairs under 5 prompts; too few to tell what predicts the labels."
    assert predictor(clean, "clip").auc == pytest.approx(1, abs=0.02) and not predictor(clean, "clip").is_loud


def test_what_labelled_the_pairs_is_no_confound(look) -> None:
    found = look(many(0.9), labelled_by="brightness")
    assert predictor(found, "brightness").labelled
    assert not any("brighter" in text for text in found.warnings)


def test_ties_say_nothing_of_the_label(look) -> None:
    pairs = many(1.0)
    ties = [replace(it, label_prob=0.5) for it in many(0.0, amount=160)[120:]]
    assert predictor(look(pairs + ties), "brightness").auc == 1
    assert predictor(look(pairs + ties), "brightness").num_pairs == 120


def test_repeats_contradictions_and_blank_images_are_counted(look) -> None:
    pairs = many(0.5)
    black = encode(Image.new("RGB", (48, 48)), "PNG")
    touched = Image.open(io.BytesIO(pairs[0].chosen)).convert("RGB")
    touched.putpixel((0, 0), (1, 2, 3))
    extra = [
        pairs[0],
        swapped(pairs[1]),
        replace(pairs[2], rejected=pairs[2].chosen),
        replace(pairs[3], chosen=black),
        replace(pairs[4], chosen=pairs[0].chosen, rejected=encode(touched, "PNG")),
    ]
    found = look(pairs + extra)
    rows = dict(found.rows)
    assert rows["contradictions"] == "2 rows, left out"
    assert rows["same pair again"] == rows["same image on both sides"] == "1 row, left out"
    assert rows["nearly the same on both sides"] == "1 of 121 pairs"
    assert rows["blank images"].startswith("1 of ")
    assert any(text.startswith("a blank image is chosen in 1 pair;") for text in found.warnings)
    assert not look(pairs).warnings[2:]


def test_prompts_that_dominate_are_named(look) -> None:
    pairs = many(0.5)
    assert not any("of all rows" in text for text in look(pairs).warnings)
    crowd = [pair("the one", 1000 + i, (100, 150)) for i in range(30)]
    found = look(pairs + crowd)
    assert found.top_prompts[0] == ("the one", 30, 0.2)
    assert any(text.startswith("one prompt has 20\u00a0% of all rows (the one)") for text in found.warnings)
    spread = [pair(f"other {i}", 2000 + i, (100, 150)) for i in range(110)]
    two = [pair(f"top {i % 2}", 3000 + i, (100, 150)) for i in range(130)]
    assert any("2 of 112 prompts have 54\u00a0% of all rows" in text for text in look(spread + two).warnings)


def test_the_widest_and_the_narrowest_margins_are_shown(look) -> None:
    widest, narrowest = look(many(0.5), num_images=12).sheets
    assert (widest.title, [block.note for block in widest.blocks]) == (
        "Widest margins",
        ["margin 119", "margin 118", "margin 117"],
    )
    assert [block.note for block in narrowest.blocks] == ["margin 0", "margin 1", "margin 2"]
    (plain,) = look([replace(it, margin=None) for it in many(0.5)], num_images=12).sheets
    assert (plain.title, len(plain.blocks)) == ("Examples", 6)


def test_nothing_and_almost_nothing_can_be_looked_at(look, tmp_path: Path) -> None:
    for pairs in ([], many(0.5)[:1], [replace(many(0.5)[0], rejected=b"nothing")]):
        found = look(pairs, num_images=4)
        write_page(tmp_path / "inspect.html", "x", found)
        assert not found.warnings
    assert found.headline == "No row can be used."


@pytest.fixture(scope="module")
def hostile_page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of pairs whose every text wants to be more than text, and whose scores are no numbers."""
    folder, rows = tmp_path_factory.mktemp("hostile"), []
    for i, it in enumerate(many(1.0)):
        row = pair_row(replace(it, prompt=HOSTILE[i % len(HOSTILE)].replace("\ud800", "")))
        scores = [{HOSTILE[2]: value, "odd": odd} for value, odd in ((1.0, float("nan")), (0.5, float("inf")))]
        row |= {f"{side}_scores": json.dumps(it) for side, it in zip(("chosen", "rejected"), scores, strict=True)}
        row |= {
            f"{side}_origin": json.dumps({"model": it, HOSTILE[1]: side})
            for side, it in zip(("chosen", "rejected"), HOSTILE, strict=False)
        }
        rows.append(row)
    (folder / "pairs").mkdir()
    write_shard(folder / "pairs" / "pairs-00000.parquet", rows, PAIRS)
    found = look_at_pairs(folder, PairsData(path=folder / "pairs", type="pairs"), 24)
    write_page(folder / "inspect.html", HOSTILE[0], found)
    return folder / "inspect.html"


def test_hostile_text_makes_no_element_and_nothing_comes_from_outside(hostile_page: Path) -> None:
    page = hostile_page.read_text("utf-8")
    tags = Elements(page).tags
    assert not any(tag in ("script", "link", "iframe") for tag, _ in tags)
    assert not [name for _, attributes in tags for name in attributes if name.startswith("on")]
    sources = [attributes["src"] for tag, attributes in tags if tag == "img"]
    assert len(sources) == 24 and all(source.startswith("data:image/png;base64,") for source in sources)
    assert [attributes["href"] for _, attributes in tags if "href" in attributes] == ["#images"]
    assert "script-src &#39;none&#39;" in page and "unsafe" not in page and "url(" not in page
    assert "{{ 7 * 7 }}" in page and "\x00" not in page and len(page) < 1_500_000


@pytest.mark.browser
@needs_chromium
def test_the_page_runs_no_script_at_all(hostile_page: Path, tmp_path: Path) -> None:
    assert "data-ran" not in run_page(hostile_page, tmp_path / "profile")
