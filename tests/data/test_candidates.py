"""Folders of images as people have them: which prompts they get, and what is left out is counted and named."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from diffusion_dpo.config import ConfigError
from diffusion_dpo.data.candidates import Candidate, find_candidates, find_units
from diffusion_dpo.data.left_out import describe
from tests.galleries import graph, infotext, png


def candidates(path: Path, prompt_column: str | None = None, *, images: bool = False) -> dict[str, Candidate]:
    units = find_units(path, prompt_column)
    found = [it for unit in units for it in unit.read(images=images)]
    assert len(found) == sum(unit.num_images for unit in units)
    return {it.where: it for it in found}


def prompts(path: Path, prompt_column: str | None = None) -> dict[str, str]:
    return {where: it.prompt or it.no_prompt for where, it in candidates(path, prompt_column).items()}


def write(folder: Path, files: dict[str, str | bytes]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


def plain(shade: int) -> bytes:
    return png({}, Image.new("RGB", (40, 40), (shade, 0, 0)))


def test_a_gallery_is_candidates_grouped_by_prompt(tmp_path: Path) -> None:
    for i in range(6):
        text = infotext(f"prompt {i // 2}", seed=i)
        write(
            tmp_path,
            {f"2026-01-0{i % 2 + 1}/{i}.png": png({"parameters": text}, Image.new("RGB", (40, 40), (i, 0, 0)))},
        )
    write(tmp_path, {"comfy.png": png({"prompt": json.dumps(graph("prompt 0"))})})
    found = candidates(tmp_path)
    groups: dict[str, list[str]] = {}
    for it in found.values():
        groups.setdefault(it.group, []).append(it.prompt)
    assert sorted(map(len, groups.values())) == [2, 2, 3]
    with_images = candidates(tmp_path, images=True)
    for name, it in found.items():
        other = with_images[name]
        assert not it.data
        assert (it.uid, it.key, it.group, it.origin, it.seed) == (
            *(other.uid, other.key, other.group, other.origin, other.seed),
        )
    assert found["2026-01-02/5.png"].seed == 5
    assert len({it.settings_hash for it in found.values()}) == 2, "two programs, each with its own settings"


@pytest.mark.parametrize(
    ("data", "prompt"),
    [
        (b"\xef\xbb\xbfa red circle\r\n", "a red circle"),
        ("a red circle".encode("utf-16"), "a red circle"),
        ("\ufeffein grüner Kreis".encode("utf-16-be"), "ein grüner Kreis"),
        (b"first\r\nsecond\r\n", "first\nsecond"),
        (b"a red circle\nNegative prompt: x\nSteps: 1, Sampler: y, Seed: 3, Size: 1x1", "a red circle"),
        (b" \n", "its caption a.txt is empty"),
        (b"ein gr\xfcner Kreis", "its caption a.txt is neither UTF-8 nor UTF-16 text"),
    ],
)
def test_captions_of_every_editor(tmp_path: Path, data: bytes, prompt: str) -> None:
    write(tmp_path, {"a.png": plain(1), "a.txt": data})
    assert prompts(tmp_path) == {"a.png": prompt}
    assert prompts(tmp_path / "a.png") == {"a.png": prompt}


def test_a_caption_is_found_wherever_it_lies_and_comes_before_what_is_inside(tmp_path: Path) -> None:
    inside = png({"parameters": infotext("inside", seed=3)})
    write(
        tmp_path,
        {
            "both.png": inside,
            "both.txt": "beside",
            "kohya.png": plain(1),
            "kohya.caption": "from .caption",
            "x/json.png": plain(2),
            "x/json.json": json.dumps({"url": "u", "caption": "from JSON"}),
            "x/settings.png": inside,
            "x/settings.json": json.dumps({"url": "u"}),
            "x/differ.png": plain(3),
            "x/differ.txt": "one",
            "x/differ.caption": "two",
            "x/bad.png": plain(4),
            "x/bad.json": "{oops",
            "none.png": plain(5),
        },
    )
    assert prompts(tmp_path) == {
        "both.png": "beside",
        "kohya.png": "from .caption",
        "none.png": "no prompt beside it or inside it",
        "x/bad.png": "x/bad.json beside it is not valid JSON",
        "x/differ.png": "different captions in x/differ.txt and x/differ.caption",
        "x/json.png": "from JSON",
        "x/settings.png": "inside",
    }
    assert candidates(tmp_path)["both.png"].seed == 3, "how it was made is still known"
    assert find_candidates(tmp_path).left_out == {}


@pytest.mark.parametrize("name", ["metadata.jsonl", "captions.csv", "metadata.tsv", "prompts.json"])
@pytest.mark.parametrize("column", ["text", "caption", "my words"])
def test_metadata_name_the_prompts(tmp_path: Path, name: str, column: str) -> None:
    rows = [("a.png", 'one, "quoted"'), ("b.png", "two"), ("gone.png", "three")]
    if name.endswith("tsv"):
        lines = [f"file_name\t{column}", *("\t".join(row) for row in rows)]
    elif name.endswith(".json"):
        lines = [json.dumps([{"filename": file, column: text} for file, text in rows])]
    elif name.endswith("csv"):
        lines = [f"file_name,{column},x", *('{},"{}",0'.format(file, text.replace('"', '""')) for file, text in rows)]
    else:
        lines = [json.dumps({"file_name": file, column: text}) for file, text in rows]
    write(
        tmp_path,
        {"train/a.png": plain(1), "train/b.png": plain(2), "c.png": plain(3), f"train/{name}": "\n".join(lines)},
    )
    asked = column if column == "my words" else None
    found = prompts(tmp_path, asked)
    assert (found["train/a.png"], found["train/b.png"]) == ('one, "quoted"', "two")
    assert found["c.png"] == "no prompt beside it or inside it"
    assert find_candidates(tmp_path, asked).left_out == {}


@pytest.mark.parametrize(
    ("column", "asked", "values", "expected"),
    [
        ("prompt", None, ["a", "b"], ["a", "b"]),
        ("TEXT", None, ["a", None], ["a", "no prompt"]),
        ("caption", None, [["a"], ["b", "c"]], ["a", "2 prompts for one image"]),
        ("words", "words", ["a", " "], ["a", "no prompt"]),
        ("words", None, ["a", "b"], ["inside", "no prompt beside it or inside it"]),
        ("text", None, [1, 2], ["the prompt is not text", "the prompt is not text"]),
    ],
)
def test_foreign_parquet_has_its_prompts_in_a_column(
    tmp_path: Path, column: str, asked: str | None, values: list[object], expected: list[str]
) -> None:
    images = [png({"parameters": infotext("inside")}), plain(1)]
    pq.write_table(pa.table({"img": images, column: values}), tmp_path / "train.parquet")
    assert list(prompts(tmp_path, asked).values()) == expected
    with pytest.raises(ConfigError, match=r"no column 'absent'. It has: img, .*set prompt_column"):
        prompts(tmp_path, "absent")


def test_what_is_left_out_is_counted_and_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pq.write_table(pa.table({"url": ["u"], "caption": ["c"]}), tmp_path / "00000.parquet")
    write(
        tmp_path,
        {
            **{f"{name}.png": png({"parameters": infotext("p")}) for name in ("1", "grid-0001", "xyz_grid-0002-77")},
            **{f"{i}.HEIC": b"x" for i in range(5)},
            "2.JFIF": plain(2),
            "clip.mp4": b"x",
            "readme.txt": "not a caption",
            ".hidden.png": b"x",
            "__MACOSX/1.png": b"x",
            "scores-clip_text.json": "{}",
        },
    )
    assert sorted(prompts(tmp_path)) == ["1.png", "2.JFIF"]
    assert find_candidates(tmp_path).left_out == {
        ".parquet without images": ["00000.parquet"],
        ".heic, which is not decoded here (convert it to PNG or JPEG)": [f"{i}.HEIC" for i in range(5)],
        ".mp4": ["clip.mp4"],
        ".txt": ["readme.txt"],
        "grids, each an overview of several images": ["grid-0001.png", "xyz_grid-0002-77.png"],
    }
    out = capsys.readouterr().out
    assert f"left out of {tmp_path}: 5 x .heic, which is not decoded here" in out
    assert "(0.HEIC, 1.HEIC, 2.HEIC, ...); 1 x .parquet without images (00000.parquet); 1 x .mp4" in out


def test_image_files_beside_parquet_with_images_are_named(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": [plain(1)]}), tmp_path / "a.parquet")
    write(tmp_path, {"b.png": plain(2)})
    found = find_candidates(tmp_path)
    assert [unit.name for unit in found.units] == ["a"]
    assert describe(found.left_out) == "1 x .png (b.png)"


@pytest.mark.parametrize("files", [{"a.heic": b"x"}, {"a.parquet": b""}, {}])
def test_a_folder_without_images_says_what_it_holds(tmp_path: Path, files: dict[str, bytes]) -> None:
    write(tmp_path, files)
    if "a.parquet" in files:
        pq.write_table(pa.table({"url": ["u"]}), tmp_path / "a.parquet")
    with pytest.raises(ConfigError, match="|".join((r"1 x \.heic, which is not decoded", "It has: url", "neither"))):
        find_units(tmp_path)


def test_links_out_of_the_folder_are_not_followed(tmp_path: Path) -> None:
    outside = write(tmp_path / "outside", {"secret.txt": "SECRET", "secret.png": plain(9), "x.png": plain(8)})
    folder = write(tmp_path / "got", {"a.png": plain(1), "b.png": plain(2), "c.txt": "inside"})
    (folder / "a.txt").symlink_to(outside / "secret.txt")
    (folder / "b.txt").symlink_to("c.txt")
    (folder / "d.png").symlink_to(outside / "secret.png")
    (folder / "more").symlink_to(outside)
    (folder / "loop").symlink_to(folder)
    found = candidates(folder)
    assert sorted(found) == ["a.png", "b.png"]
    assert found["b.png"].prompt == "inside"
    assert found["a.png"].prompt == ""
    assert "leaves the folder" in found["a.png"].no_prompt
    left_out = find_candidates(folder).left_out
    assert left_out["links out of the folder or to a folder, which are not followed"] == ["d.png", "loop", "more"]


def test_a_file_that_cannot_be_read_costs_that_image(tmp_path: Path) -> None:
    write(tmp_path, {"a.png": plain(1), "b.png": b"", "b.txt": "caption"})
    for images in (False, True):
        found = candidates(tmp_path, images=images)
        assert (found["b.png"].broken, found["b.png"].prompt) == ("an empty file", "caption")
        assert found["a.png"].broken == ""
        assert found["b.png"].uid == candidates(tmp_path)["b.png"].uid
