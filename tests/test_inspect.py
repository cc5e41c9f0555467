"""`inspect` knows what a folder holds, counts it, draws it, and leaves it as it was."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from diffusion_dpo.config import ConfigError, load
from diffusion_dpo.data import PreferencePair, shards
from diffusion_dpo.data.candidates import find_units
from diffusion_dpo.data.contact_sheet import GREEN, GREY, RED, Block, Tile, draw_sheet
from diffusion_dpo.data.images import decode_rgb, pixel_hash
from diffusion_dpo.data.pairs import pair_row
from diffusion_dpo.data.rows import pair_id
from diffusion_dpo.inspect import run
from diffusion_dpo.settings import InspectConfig
from tests.photos import encode, folder_hash, jpeg, photo


def pairs_folder(root: Path) -> Path:
    rows = []
    for i, label_prob in enumerate((1.0, 0.9, 0.5)):
        images = encode(photo(i), "PNG"), encode(photo(i + 1), "PNG")
        pair = PreferencePair(
            pair_id(f"prompt {i}", *images),
            f"prompt {i}",
            *images,
            label_prob=label_prob,
            chosen_scores={"clip": 0.3 + i},
            rejected_scores={"clip": 0.1 + i},
            margin=0.2 + i,
        )
        rows.append(pair_row(pair))
    shards.write_shard(root / "pairs-00000.parquet", rows, shards.PAIRS)
    return root


def candidates_folder(root: Path) -> Path:
    rows = []
    for i in range(6):
        data = encode(photo(i % 2 if i < 4 else 3), "PNG")
        rows.append(
            {
                "uid": pixel_hash(decode_rgb(data)),
                "prompt_id": f"p{i // 3}",
                "prompt": f"prompt {i // 3}",
                "index": i % 3,
                "seed": i,
                "image": shards.image_struct(data if i != 4 else data[:300]),
                "references": [],
                "origin": "",
                "settings_hash": "h",
            }
        )
    shards.write_shard(root / "images-00000.parquet", rows, shards.CANDIDATES)
    facts = {"name": "clip", "higher_is_better": True, "auxiliary": False}
    header = {"scorer": "clip", "licence": "MIT", "fingerprint": "f", "metrics": [facts]}
    (root / "scores-clip.json").write_text(json.dumps(header))
    keys = [candidate.key for unit in find_units(root) for candidate in unit.read()]
    scores = [
        {"uid": "", "key": key, "metric": "clip", "value": i / 10, "reason": "", "fingerprint": "f"}
        for i, key in enumerate(keys[:4])
    ]
    shards.write_shard(root / "scores-clip-00000.parquet", scores, shards.SCORES)
    return root


def pickapic_folder(root: Path) -> Path:
    a, b = jpeg(0), jpeg(1, (80, 120), mode="L")
    columns = {"caption": list("xyzt"), "jpg_0": [a, a[:500], a, a], "jpg_1": [b] * 4, "label_0": [1, 1, 0.5, None]}
    pq.write_table(pa.table(columns), root / "train-0.parquet")
    return root


def metadata_folder(root: Path) -> Path:
    (root / "a.jpg").write_bytes(jpeg(0))
    (root / "b.jpg").write_bytes(jpeg(1))
    lines = [
        {"prompt": "x", "chosen": "a.jpg", "rejected": "b.jpg"},
        {"prompt": "y", "chosen": "../a.jpg", "rejected": "b.jpg"},
    ]
    (root / "metadata.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    return root


def photo_folder(root: Path) -> Path:
    for i in range(3):
        (root / f"{i}.jpg").write_bytes(jpeg(i))
    (root / "broken.png").write_bytes(b"nothing")
    return root


KINDS = {
    pairs_folder: [
        "data.type=pairs",
        "rows 3",
        "pairs 3",
        "ties 1",
        "margin 0.2 to 2.2, median 1.2",
        "clip, chosen 0.3 to 2.3",
        "96 x 64 (6) px",
        "next: diffusion-dpo train 'data.path=",
    ],
    candidates_folder: [
        "kind candidates",
        "images 5 of 6",
        "prompts 2 different",
        "same image again 1",
        "clip 0.1 to 0.3",
        "1 without a score",
        "1 x truncated image file (images-00000.parquet row 4)",
        "next: diffusion-dpo pair 'path=",
    ],
    pickapic_folder: [
        "data.type=pickapic",
        "rows 4",
        "pairs 2",
        "ties 1",
        "dropped: 2",
        "1 x no label (train-0.parquet row 3)",
        "1 x chosen: truncated image file (train-0.parquet row 1)",
        "next: diffusion-dpo train data.type=pickapic 'data.path=",
    ],
    metadata_folder: [
        "data.type=folder",
        "pairs 1",
        "1 x chosen: the file name leaves the folder (metadata.jsonl line 2: ../a.jpg)",
        "next: diffusion-dpo train data.type=folder 'data.path=",
    ],
    photo_folder: [
        "images without prompts",
        "images 3 of 4",
        "1 x not an image file (broken.png)",
        "next: diffusion-dpo score 'path=",
    ],
}


@pytest.mark.parametrize("make", KINDS, ids=lambda make: make.__name__)
def test_every_kind_is_counted_drawn_and_left_alone(make, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("diffusion_dpo.console._console.width", 200)
    (tmp_path / "the data").mkdir()
    path = make(tmp_path / "the data")
    before = folder_hash(path)
    page = run(InspectConfig(path=path))
    assert folder_hash(path) == before
    assert page == Path("runs/inspect/the data/inspect.html")
    assert page.read_text("utf-8").count("<img ") >= 2
    with Image.open(page.with_name("contact-sheet.png")) as image:
        image.load()
        assert min(image.size) > 150
    out = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for words in KINDS[make]:
        assert words in out


@pytest.mark.parametrize("make", [pairs_folder, candidates_folder])
def test_no_image_is_shown_when_nobody_asks_for_it(make, tmp_path):
    (tmp_path / "d").mkdir()
    page = run(InspectConfig(path=make(tmp_path / "d"), num_images=0, output_dir=tmp_path / "out"))
    assert [it.name for it in (tmp_path / "out").iterdir()] == ["inspect.html"]
    assert "<img" not in page.read_text("utf-8")


def test_candidates_of_two_settings_in_one_folder_are_warned_of(tmp_path, capsys):
    for name, settings_hash in (("00000", "h1"), ("00001", "h2")):
        (tmp_path / name).mkdir()
        file = candidates_folder(tmp_path / name) / "images-00000.parquet"
        rows = [row | {"settings_hash": settings_hash} for row in shards.read_rows(file)]
        (tmp_path / "d").mkdir(exist_ok=True)
        shards.write_shard(tmp_path / "d" / f"images-{name}.parquet", rows, shards.CANDIDATES)
    page = run(InspectConfig(path=tmp_path / "d", output_dir=tmp_path / "out"))
    for text in (capsys.readouterr().out, page.read_text("utf-8")):
        assert "drawn with 2 different settings (settings_hash: 5 x h1, 5 x h2)" in text
    run(InspectConfig(path=tmp_path / "00000", output_dir=tmp_path / "out"))
    assert "different settings" not in capsys.readouterr().out


def test_judges_of_candidates_are_compared_in_their_own_directions(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("diffusion_dpo.console._console.width", 200)
    (tmp_path / "d").mkdir()
    path = candidates_folder(tmp_path / "d")
    rows = list(shards.read_rows(path / "scores-clip-00000.parquet"))
    facts = {"name": "lpips", "higher_is_better": False, "auxiliary": False}
    header = {"scorer": "lpips", "licence": "BSD", "fingerprint": "f", "metrics": [facts]}
    (path / "scores-lpips.json").write_text(json.dumps(header))
    worse = [row | {"metric": "lpips", "value": -row["value"]} for row in rows]
    shards.write_shard(path / "scores-lpips-00000.parquet", worse, shards.SCORES)
    run(InspectConfig(path=path, output_dir=tmp_path / "out"))
    assert "tau of clip, lpips │ 1.00, over 1 prompt" in " ".join(capsys.readouterr().out.split())


def test_nothing_there_says_what_was_seen_and_what_is_expected(tmp_path):
    (tmp_path / "a.zip").write_bytes(b"x")
    (tmp_path / "b.csv").write_bytes(b"x")
    with pytest.raises(ConfigError, match=r'(?s)holds 1 x \.zip, 1 x \.csv\..*metadata\.jsonl.*\{"prompt": "a cat"'):
        run(InspectConfig(path=tmp_path, output_dir=tmp_path.parent / "out"))
    with pytest.raises(ConfigError, match="there is no file or folder nowhere"):
        run(InspectConfig(path=Path("nowhere")))


def test_parquet_with_foreign_columns_is_shown_the_way(tmp_path):
    (tmp_path / "d").mkdir()
    pq.write_table(pa.table({"text": ["x"], "top": [b"x"], "flop": [b"y"]}), tmp_path / "d" / "a.parquet")
    with pytest.raises(
        ConfigError,
        match=r"has the columns flop, text, top, of which no layout is known: there is a prompt, .*data\.type=hub",
    ):
        run(InspectConfig(path=tmp_path / "d", output_dir=tmp_path / "out"))


def test_the_sheet_is_never_written_into_the_data(tmp_path):
    path = photo_folder(tmp_path)
    with pytest.raises(ConfigError, match="lies inside"):
        run(InspectConfig(path=path, output_dir=path / "out"))
    assert not (path / "out").exists()


def test_the_page_shows_whole_images_with_their_edges():
    image = Image.new("RGB", (300, 100), (10, 20, 30))
    blocks = [
        Block(
            "a prompt " * 40, (Tile(image, "chosen", GREEN), Tile(image, "rejected " * 30, RED), Tile(image, "", GREY))
        )
    ]
    page = draw_sheet("x" * 3000, blocks * 5)
    colours = {colour for _, colour in page.getcolors(1 << 24)}
    assert {GREEN, RED, GREY, (10, 20, 30)} <= colours
    assert page.getpixel((page.width - 1, page.height - 1)) == (255, 255, 255)


def test_odd_prompts_can_be_drawn():
    prompts = ["", "\x00\n\r\t", "‮right to left", "猫" * 500, "w" * 100_000, "<script>alert(1)</script>"]
    page = draw_sheet("", [Block(prompt, (Tile(photo(0), prompt),)) for prompt in prompts])
    assert page.width < 4000
    assert page.height < 4000


def test_pairs_of_any_other_kind_are_named_as_for_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, color in (("a.png", "red"), ("b.png", "blue")):
        Image.new("RGB", (40, 40), color).save(tmp_path / name)
    (tmp_path / "rows.jsonl").write_text('{"prompt": "p", "path1": "a.png", "path2": "b.png"}\n')
    source = ["data.type=hpdv3", f"data.path={tmp_path / 'rows.jsonl'}"]
    run(load(InspectConfig, None, [*source, f"output_dir={tmp_path / 'out'}"]))
    out = " ".join(capsys.readouterr().out.split())
    assert "data.type=hpdv3" in out
    assert f"next: diffusion-dpo train data.type=hpdv3 data.path={tmp_path / 'rows.jsonl'}" in out
