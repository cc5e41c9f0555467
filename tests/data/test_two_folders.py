"""Two folders with the same file names: what is paired, and what is named because it is not."""

import json
from pathlib import Path

import pytest
from PIL import Image

from diffusion_dpo.config import ConfigError
from diffusion_dpo.data import Dropped, PreferencePair
from diffusion_dpo.data.collect import survey
from diffusion_dpo.data.two_folders import TwoFoldersData
from tests.galleries import infotext, png
from tests.photos import encode, jpeg, photo

A, B = jpeg(0), jpeg(1)


def make(folder: Path, **files: bytes | str) -> TwoFoldersData:
    """Write files; `__` in a name stands for `/`, the last `_` for the dot."""
    for side in ("chosen", "rejected"):
        (folder / side).mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        path = folder / ".".join(name.replace("__", "/").rsplit("_", 1))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return TwoFoldersData(path=folder)


def items(source: TwoFoldersData) -> list[PreferencePair | Dropped]:
    found = list(source.read())
    assert source.num_rows() == len(found)
    return found


def test_files_of_the_same_name_are_a_pair(tmp_path: Path) -> None:
    png = encode(photo(2), "PNG")
    source = make(
        tmp_path,
        chosen__cat_jpg=A,
        rejected__cat_jpg=B,
        rejected__cat_txt=" a cat\n",
        chosen__more__dog_jpg=B,
        chosen__more__dog_txt="a dog",
        rejected__more__dog_PNG=png,
        chosen__notes_md="no image",
        chosen__gone_txt="a caption alone",
    )
    (tmp_path / "chosen" / ".hidden.jpg").write_bytes(A)
    cat, dog = items(source)
    assert isinstance(cat, PreferencePair) and isinstance(dog, PreferencePair)
    assert (cat.prompt, cat.chosen, cat.rejected, cat.where) == ("a cat", A, B, "chosen/cat.jpg")
    assert (dog.prompt, dog.chosen, dog.rejected) == ("a dog", B, png)
    assert cat.chosen_origin == {}, "the side is the label, and says no more"


def test_captions_may_be_lines(tmp_path: Path) -> None:
    lines = ['{"file_name": "cat.jpg", "prompt": "a cat"}', "{", '{"file_name": "", "prompt": 7}', '{"prompt": "x"}']
    source = make(tmp_path, chosen__cat_jpg=A, rejected__cat_jpg=B, captions_jsonl="\n".join(lines))
    pair, *broken = items(source)
    assert isinstance(pair, PreferencePair) and pair.prompt == "a cat"
    assert broken == [
        Dropped("captions.jsonl line 2", "not valid JSON"),
        Dropped("captions.jsonl line 3", "file_name and prompt must be text"),
        Dropped("captions.jsonl line 4", "no 'file_name'"),
    ]
    make(tmp_path, rejected__cat_txt="another cat")
    assert items(source)[0] == Dropped("chosen/cat.jpg", "different captions")
    make(tmp_path, rejected__cat_txt="a cat ")
    assert isinstance(items(source)[0], PreferencePair)


def test_what_has_no_partner_or_caption_is_named(tmp_path: Path) -> None:
    files = {"chosen__a_jpg": A, "rejected__b_jpg": B, "chosen__c_jpg": A, "chosen__c_png": A, "rejected__c_jpg": B}
    source = make(tmp_path, **files, chosen__d_jpg=A, rejected__d_jpg=B)
    assert items(source) == [
        Dropped("chosen/a.jpg", "no file of this name in rejected/"),
        Dropped("rejected/b.jpg", "no file of this name in chosen/"),
        Dropped("chosen/c.jpg", "several files of this name"),
        Dropped("chosen/d.jpg", "no caption"),
    ]


def test_without_a_caption_the_prompt_inside_the_images_counts(tmp_path: Path) -> None:
    def inside(prompt: str, shade: int) -> bytes:
        return png({"parameters": infotext(prompt, seed=shade)}, Image.new("RGB", (40, 40), (shade, 0, 0)))

    both = {"a": ("a cat", "a cat"), "b": ("a cat", ""), "c": ("a cat", "a dog"), "d": ("a cat", "a cat")}
    for number, (name, prompts) in enumerate(both.items()):
        chosen, rejected = (inside(prompt, 2 * number + side) for side, prompt in enumerate(prompts))
        make(tmp_path, **{f"chosen__{name}_png": chosen, f"rejected__{name}_png": rejected})
    make(tmp_path, chosen__d_txt=infotext("a caption"), chosen__e_png=inside("", 20), rejected__e_jpg=B)
    a, b, c, d, e = items(TwoFoldersData(path=tmp_path))
    assert [it.prompt for it in (a, b, d) if isinstance(it, PreferencePair)] == ["a cat", "a cat", "a caption"]
    assert c == Dropped("chosen/c.png", "no caption, and different prompts inside the two images")
    assert e == Dropped("chosen/e.png", "no caption: a generator wrote an empty prompt into it")


def test_captions_of_any_kind(tmp_path: Path) -> None:
    texts = {"a": "x" * 100_000, "b": "a\0b", "c": b"\xff\xfe\x00", "d": "  ", "e": "\ufeffa cat"}
    for name, text in texts.items():
        make(tmp_path, **{f"chosen__{name}_jpg": A, f"rejected__{name}_jpg": B, f"chosen__{name}_txt": text})
    long, null, broken, blank, marked = items(TwoFoldersData(path=tmp_path))
    assert isinstance(long, PreferencePair) and isinstance(null, PreferencePair)
    assert broken == Dropped("chosen/c.jpg", "caption: neither UTF-8 nor UTF-16 text")
    assert blank == Dropped("chosen/d.jpg", "no prompt")
    assert isinstance(marked, PreferencePair) and marked.prompt == "a cat"


LINK = "the file leaves the folder: a link"


def test_links_that_leave_the_folder_are_not_followed(tmp_path: Path) -> None:
    (tmp_path / "secret.jpg").write_bytes(A)
    (tmp_path / "secret.txt").write_text("a secret")
    source = make(tmp_path / "d", rejected__a_jpg=B, chosen__a_txt="x", chosen__b_jpg=A, rejected__b_jpg=B)
    (tmp_path / "d" / "chosen" / "a.jpg").symlink_to(tmp_path / "secret.jpg")
    (tmp_path / "d" / "chosen" / "b.txt").symlink_to(tmp_path / "secret.txt")
    assert items(source) == [
        Dropped("chosen/a.jpg", f"chosen: {LINK}; copy what it leads to, or set data.images_dir to it"),
        Dropped("chosen/b.jpg", f"caption: {LINK}"),
    ]


def test_a_name_that_is_no_text_can_be_told(tmp_path: Path) -> None:
    source = make(tmp_path, rejected__a_jpg=B)
    Path(str(tmp_path / "chosen") + "/\udcff.jpg").write_bytes(A)
    found = survey(source)
    assert found.drops == {"no file of this name in rejected/": 1, "no file of this name in chosen/": 1}
    assert json.dumps([drop.where for drop in found.dropped]).isascii()


def test_a_folder_that_is_missing_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "chosen").mkdir()
    with pytest.raises(ConfigError, match=r"holds no folder rejected/; it must hold chosen/ and rejected/"):
        list(TwoFoldersData(path=tmp_path).read())


def test_the_stamp_changes_with_any_file(tmp_path: Path) -> None:
    source = make(tmp_path, chosen__a_jpg=A, rejected__a_jpg=B)
    stamps = [source.stamp()]
    for change in (
        {"chosen__a_txt": "x"},
        {"rejected__b_jpg": B},
        {"captions_jsonl": ""},
        {"chosen__a_jpg": A + b" "},
    ):
        stamps.append(make(tmp_path, **change).stamp())
    assert len(set(stamps)) == 5
