"""What is left of a data set once every row was looked at, and what people are told of the rest."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pydantic import Field

from diffusion_dpo.config import ConfigError
from diffusion_dpo.data import Dropped, PairSource, PreferencePair
from diffusion_dpo.data import collect as module
from diffusion_dpo.data.collect import collect, in_order, survey
from diffusion_dpo.data.folder import FolderData
from diffusion_dpo.data.images import decode_rgb, pixel_hash
from diffusion_dpo.data.index import Collected
from diffusion_dpo.data.rows import make_labelled_pair
from tests.photos import encode, jpeg, photo

A, B, C = (jpeg(i) for i in range(3))
Row = tuple[str, bytes, bytes, float]


class Rows(PairSource):
    """Rows of (prompt, first image, second image, label), or drops of the importer's own."""

    rows: list = Field([], exclude=True)

    def read(self) -> Iterator[PreferencePair | Dropped]:
        for number, row in enumerate(self.rows):
            if isinstance(row, Dropped):
                yield row
            else:
                prompt, first, second, label = row
                yield make_labelled_pair(f"row {number}", prompt, (first, second), label, ties="keep", source="test")


def gather(*rows: Row | Dropped, max_broken_share: float = 1.0) -> Collected:
    return collect(Rows(rows=list(rows)), max_broken_share=max_broken_share)


def test_good_rows_come_back_in_order_with_the_facts_of_their_images():
    found = gather(("x", A, B, 1), ("y", B, C, 0), ("z", jpeg(3, (50, 70)), A, 0.75))
    assert [pair.prompt for pair in found] == [record.prompt for record in found.records] == ["x", "y", "z"]
    for pair, record in zip(found, found.records, strict=True):
        assert pair.pair_id == record.pair_id
        for side in ("chosen", "rejected"):
            image = decode_rgb(getattr(pair, side))
            assert getattr(record, f"{side}_size_px") == image.size
            assert getattr(record, f"{side}_uid") == getattr(pair, f"{side}_uid") == pixel_hash(image)
    assert (len(found), found.drops, found.broken_share) == (3, {}, 0.0)


def test_one_pair_is_enough():
    assert len(gather(("x", A, B, 1))) == 1


def test_a_broken_image_drops_its_row_and_no_partner_moves():
    images = [jpeg(i % 4, (64 + i, 48)) for i in range(200)]
    rows = [(f"p{i}", images[2 * i], images[2 * i + 1], 1) for i in range(100)]
    rows[10] = ("p10", images[20][:600], images[21], 1)
    rows[70] = ("p70", images[140], b"<html>", 1)
    found = gather(*rows)
    assert found.drops == {"chosen: truncated image file": 1, "rejected: a web page or SVG, not an image file": 1}
    assert [drop.where for drop in found.dropped] == ["row 10", "row 70"]
    kept = [i for i in range(100) if i not in (10, 70)]
    pairs = list(found)
    assert [pair.prompt for pair in pairs] == [f"p{i}" for i in kept]
    assert all((pair.chosen, pair.rejected) == rows[i][1:3] for pair, i in zip(pairs, kept, strict=True))


def test_two_images_with_equal_pixels_are_no_pair():
    png, bmp = (encode(photo(0), kind) for kind in ("PNG", "BMP"))
    found = gather(("x", png, bmp, 1), ("y", A, B, 1))
    assert found.drops == {"chosen and rejected are the same image": 1}


def test_the_same_pair_again_is_dropped_whatever_file_holds_it():
    png, other = (encode(photo(0), kind) for kind in ("PNG", "BMP"))
    found = gather(("x", png, B, 1), ("x", other, B, 1), ("another prompt", png, B, 1), ("x", png, B, 0.9))
    assert found.drops == {"the same pair again": 2}
    assert [(drop.where, drop.broken) for drop in found.dropped] == [("row 1", False), ("row 3", False)]


def test_a_pair_with_both_labels_is_dropped_whole():
    found = gather(("x", A, B, 1), ("y", A, C, 1), ("x", B, A, 1), ("x", A, B, 1))
    assert [pair.prompt for pair in found] == ["y"]
    assert found.drops == {"labelled in both directions": 3}
    assert sorted(drop.where for drop in found.dropped) == ["row 0", "row 2", "row 3"]
    assert found.broken_share == 0


def test_a_tie_contradicts_nothing():
    found = gather(("x", A, B, 1), ("x", B, A, 0.5))
    assert found.drops == {"the same pair again": 1}


@pytest.mark.parametrize("share, fatal", [(0.24, True), (0.25, False)])
def test_too_many_broken_rows_are_fatal(share, fatal):
    rows = [("x", A[:600], B, 1), ("y", A, B, 1), ("z", A, B, 1), ("t", A, B, 1)]
    if not fatal:
        assert len(gather(*rows, max_broken_share=share)) == 3
        return
    with pytest.raises(
        ConfigError, match=r"(?s)25% of the 4 rows of .* 1 x chosen: truncated image file \(row 0\)"
    ) as error:
        gather(*rows, max_broken_share=share)
    assert "max_broken_share = 0.24" in str(error.value)


def test_unwanted_rows_are_not_broken():
    ties = [Dropped(f"row {i}", "tie", broken=False) for i in range(9)]
    assert len(gather(*ties, ("x", A, B, 1), max_broken_share=0)) == 1


@pytest.mark.parametrize(
    "rows, words",
    [
        (
            [Dropped(f"row {i}", "tie", broken=False) for i in range(5)],
            r"(?s)all 5 rows .*5 x tie \(row 0, row 1, row 2, ...\)",
        ),
        ([], "no pairs are left from the data .*: it has no rows"),
        ([("x", A, A, 1)], "(?s)all 1 rows .*1 x chosen and rejected are the same image"),
    ],
)
def test_nothing_left_says_why(rows, words):
    with pytest.raises(ConfigError, match=words):
        gather(*rows)


def test_drops_are_named(capsys):
    gather(("x", A[:600], B, 1), ("y", A, B, 1), Dropped("row 2", "tie", broken=False))
    out = capsys.readouterr().out
    assert "1 pairs of 3 rows" in out
    assert "1 x chosen: truncated image file (row 0)" in out
    assert "1 x tie (row 2)" in out


def test_fingerprint_changes_with_content_labels_and_order():
    first, second = ("x", A, B, 1), ("y", A, B, 1)
    base = gather(first, second).fingerprint
    assert base == gather(first, ("z", A, A, 1), second).fingerprint
    others = [gather(second, first), gather(first), gather(first, ("y", A, B, 0.9)), gather(first, ("y", A, C, 1))]
    assert len({base, *(it.fingerprint for it in others)}) == 5


def test_data_that_changes_underneath_is_noticed():
    source = Rows(rows=[("x", A, B, 1), ("y", A, B, 1)])
    found = survey(source)
    source.rows[0] = ("x", A, C, 1)
    with pytest.raises(ConfigError, match="row 0 changed while it was being used"):
        list(found)
    source.rows[:] = [("x", A, B, 1)]
    with pytest.raises(ConfigError, match="row 1 is gone"):
        list(found)


def test_threads_keep_the_order_and_read_only_a_little_ahead():
    taken = []

    def items() -> Iterator[int]:
        for i in range(1000):
            taken.append(i)
            yield i

    results = in_order(lambda i: i * i, items())
    assert [next(results) for _ in range(70)] == [i * i for i in range(70)]
    assert len(taken) <= 2 * module._ITEMS_AT_ONCE


@pytest.mark.parametrize(
    ("white", "size", "why"),
    [
        (slice(0, 0), (96, 64), "mask: all black in the square that is trained on"),
        (slice(0, 8), (96, 64), "mask: all black in the square that is trained on"),
        (slice(0, 96), (64, 64), "mask: not of the size of both images"),
        (slice(40, 48), (96, 64), None),
    ],
)
def test_a_mask_must_fit_its_pair(tmp_path: Path, white: slice, size: tuple[int, int], why: str | None):
    for number in (1, 2):
        Image.new("RGB", (96, 64), (number, 0, 0)).save(tmp_path / f"{number}.png")
    picture = np.zeros((size[1], size[0]), np.uint8)
    picture[:, white] = 255
    Image.fromarray(picture).save(tmp_path / "mask.png")
    line = {"prompt": "a cat", "chosen": "1.png", "rejected": "2.png", "mask": "mask.png"}
    (tmp_path / "metadata.jsonl").write_text(json.dumps(line) + "\n" + json.dumps(line | {"mask": None}) + "\n")
    found = survey(FolderData(path=tmp_path))
    if why is None:
        assert [record.has_mask for record in found.records] == [True]
        assert [drop.reason for drop in found.dropped] == ["the same pair again"]
    else:
        assert [record.has_mask for record in found.records] == [False]
        assert [drop.reason for drop in found.dropped] == [why]
