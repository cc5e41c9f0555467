"""The blind sheet: it gives no label away, it is the same for the same pairs, and it counts what a person answers."""

import functools
import hashlib
import itertools
import json
import re
from pathlib import Path

import pytest

from diffusion_dpo.data import PreferencePair
from diffusion_dpo.data.rows import pair_id
from diffusion_dpo.report import audit
from diffusion_dpo.report.audit import write_audit
from tests.browser import HOSTILE, Elements, needs_chromium, run_page
from tests.photos import encode, photo


@functools.cache
def picture(number: int, kind: str, side_px: int = 200) -> bytes:
    return encode(photo(number, (side_px, side_px)), kind)


def pairs(amount: int = 20, **fields: object) -> list[PreferencePair]:
    """Pairs whose chosen image is a PNG, and whose rejected one is a JPEG."""
    made = []
    for i in range(amount):
        prompt = HOSTILE[i].replace("\ud800", "") if i < len(HOSTILE) else f"prompt {i}"
        images = picture(i % 4, "PNG"), picture((i + 1) % 4, "JPEG")
        made.append(PreferencePair(pair_id(prompt, *images), prompt, *images, chosen_uid=f"uid{i}", **fields))
    return made


def key_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "audit.jsonl").read_text("utf-8").splitlines()]


def test_the_key_names_the_images_that_the_page_shows(tmp_path: Path) -> None:
    made = {pair.pair_id: pair for pair in pairs()}
    assert write_audit(tmp_path, made.values(), 0, amount=12) == tmp_path / "audit.html"
    key = key_of(tmp_path)
    assert [row["number"] for row in key] == list(range(1, 13))
    assert len({row["pair_id"] for row in key}) == 12
    for row in key:
        pair = made[row["pair_id"]]
        other = "right" if row["chosen"] == "left" else "left"
        assert row["prompt"] == pair.prompt
        assert row[f"{row['chosen']}_sha256"] == hashlib.sha256(pair.chosen).hexdigest()
        assert row[f"{other}_sha256"] == hashlib.sha256(pair.rejected).hexdigest()
        assert row[f"{row['chosen']}_uid"] == pair.chosen_uid and row[f"{other}_uid"] == ""


def test_sides_and_order_follow_from_ids_and_seed_alone(tmp_path: Path) -> None:
    texts, orders = [], []
    for name, seed, order in (("a", 0, 1), ("b", 0, -1), ("c", 1, 1)):
        (tmp_path / name).mkdir()
        page = write_audit(tmp_path / name, iter(pairs()[::order]), seed, amount=12)
        texts.append(page.read_bytes() + (tmp_path / name / "audit.jsonl").read_bytes())
        orders.append([row["pair_id"] for row in key_of(tmp_path / name)])
    assert texts[0] == texts[1] != texts[2]
    assert set(orders[0]) != set(orders[2])
    many = [PreferencePair(f"{i}", "p", picture(0, "PNG", 32), picture(1, "PNG", 32)) for i in range(300)]
    write_audit(tmp_path, many, 0, amount=300)
    lefts = [row["chosen"] == "left" for row in key_of(tmp_path)]
    assert 110 < sum(lefts) < 190
    assert 110 < sum(a == b for a, b in itertools.pairwise(lefts)) < 190


def test_what_can_be_seen_gives_no_label_away(tmp_path: Path) -> None:
    page = write_audit(tmp_path, pairs(margin=0.25, chosen_scores={"clip": 1.0}), 0, amount=20).read_text("utf-8")
    seen = re.sub(r"<script.*?</script>|<style>.*?</style>", "", page, flags=re.DOTALL)
    assert not re.search(r"chosen|rejected|margin|clip|0\.25|uid\d", seen)
    images = [attributes for tag, attributes in Elements(page).tags if tag == "img"]
    assert len(images) == 40
    assert {image["src"].partition(",")[0] for image in images} == {"data:image/webp;base64"}
    assert [image["alt"] for image in images] == ["left", "right"] * 20


def test_hostile_prompts_stay_text_and_nothing_comes_from_outside(tmp_path: Path) -> None:
    page = write_audit(tmp_path, pairs(), 0, amount=20).read_text("utf-8")
    tags = Elements(page).tags
    assert sum(tag == "script" for tag, _ in tags) == 2
    assert not [name for _, attributes in tags for name in attributes if name.startswith("on") or name == "href"]
    assert "unsafe" not in page and "default-src &#39;none&#39;" in page and "url(" not in page
    assert len(page) < 2_000_000 and "\x00" not in page


def test_ties_have_no_side_and_single_images_are_passed_over(tmp_path: Path) -> None:
    tie, single = pairs(1, label_prob=0.5)[0], PreferencePair("single", "x", encode(photo(0)), b"")
    write_audit(tmp_path, [tie, single], 0, amount=9)
    (row,) = key_of(tmp_path)
    assert row["chosen"] is None and row["label_prob"] == 0.5


PROBE = """
const probe = {};
const press = (name) => document.dispatchEvent(new KeyboardEvent("keydown", { key: name }));
probe.blind = [byId("result").hidden, byId("reveal").disabled];
const arrows = { left: "ArrowLeft", right: "ArrowRight" };
const other = { left: "right", right: "left" };
key.slice(0, 6).forEach(({ chosen }, i) => press(arrows[i < 5 ? chosen : other[chosen]]));
press("ArrowDown");
cards[7].querySelector("input").click();
press("k"); press("k"); probe.current = cards.findIndex((card) => card.classList.contains("current"));
probe.progress = byId("progress").value;
byId("reveal").click();
probe.title = byId("result-title").textContent;
probe.detail = byId("detail").textContent;
probe.lines = byId("answers").value.trim().split("\\n").map(JSON.parse);
probe.href = byId("download").href.slice(0, 5);
probe.truths = cards.filter((card) => card.querySelector(".truth.against")).length;
const evil = "document.documentElement.dataset.ran = 1";
document.body.insertAdjacentHTML("beforeend", `<img src="data:," onerror="${evil}">`);
document.body.append(Object.assign(document.createElement("script"), { textContent: evil }));
setTimeout(() => { document.documentElement.dataset.probe = JSON.stringify(probe); }, 50);
"""


@pytest.mark.browser
@needs_chromium
def test_a_person_answers_by_key_and_sees_how_often_they_agree(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = audit.asset
    monkeypatch.setattr(audit, "asset", lambda name: plain(name) + (PROBE if name == "audit.js" else ""))
    root = run_page(write_audit(tmp_path, pairs(), 0, amount=10), tmp_path / "profile")
    assert "data-ran" not in root, "text of the user's, or a script that is not ours, was run"
    probe = json.loads(root["data-probe"] or "")
    key = key_of(tmp_path)
    eighth = key[7]["chosen"] == "left"
    agreed = 5 + eighth
    assert probe["blind"] == [True, True]
    assert probe["current"] == 5 and probe["progress"] == "8 of 10 pairs"
    share = round(100 * agreed / 7)
    assert probe["title"] == f"You agree with the labels on {agreed} of 7 pairs: {share} %."
    low, high = {5: (36, 92), 6: (49, 97)}[agreed]  # statsmodels' proportion_confint(method="wilson")
    assert f"95 % interval {low} % to {high} %" in probe["detail"]
    assert "On 1 pair you could not tell. 2 pairs left open." in probe["detail"]
    assert [row["pair_id"] for row in probe["lines"]] == [row["pair_id"] for row in key[:8]]
    assert [row["agrees"] for row in probe["lines"]] == [True] * 5 + [False, None, eighth]
    assert probe["href"] == "blob:" and probe["truths"] == 2 - eighth
