"""`hub` reads what Hugging Face `datasets` writes, and the columns of data sets that are about."""

from pathlib import Path

import datasets
from PIL import Image

from diffusion_dpo.data import Dropped, PreferencePair
from diffusion_dpo.data.collect import survey
from diffusion_dpo.data.hub import HubData
from diffusion_dpo.data.images import decode_rgb, pixel_hash
from tests.photos import encode, jpeg, photo

A, B, C, D = (jpeg(i) for i in range(4))


def written(folder: Path, columns: dict[str, list], *images: str) -> str:
    """Let `datasets` write columns to Parquet, some of them as its Image feature."""
    data = datasets.Dataset.from_dict(columns)
    for name in images:
        data = data.cast_column(name, datasets.Image())
    data.to_parquet(folder / "train-00000-of-00001.parquet")
    return str(folder)


def test_prompt_chosen_rejected(tmp_path: Path) -> None:
    """The columns of open-image-preferences-v1-binarized and its like."""
    chosen = [{"bytes": data, "path": name} for data, name in ((A, "a.jpg"), (B, None))]
    rejected = [{"bytes": encode(photo(i), "PNG"), "path": None} for i in (1, 2)]
    columns = {"prompt": ["x", "y"], "chosen": chosen, "rejected": rejected, "category": ["c"] * 2}
    found = survey(HubData(path=written(tmp_path, columns, "chosen", "rejected")))
    assert not found.dropped
    assert [pair.chosen for pair in found] == [A, B]
    assert [record.rejected_uid for record in found.records] == [pixel_hash(photo(i)) for i in (1, 2)]


def test_a_file_that_datasets_left_outside_is_not_opened(tmp_path: Path) -> None:
    """`to_parquet` writes the path of an image file as it was given; `datasets` itself opens it, we do not."""
    (tmp_path / "a.jpg").write_bytes(A)
    columns = {"prompt": ["x"], "chosen": [str(tmp_path / "a.jpg")], "rejected": [str(tmp_path / "a.jpg")]}
    [item] = HubData(path=written(tmp_path, columns, "chosen", "rejected")).read()
    assert item == Dropped("train-00000-of-00001.parquet row 0", "chosen: a path instead of image bytes")


def test_pillow_images_survive(tmp_path: Path) -> None:
    columns = {"prompt": ["x"], "chosen": [photo(0)], "rejected": [photo(1, mode="L")]}
    features = {"prompt": datasets.Value("string"), "chosen": datasets.Image(), "rejected": datasets.Image()}
    datasets.Dataset.from_dict(columns, features=datasets.Features(features)).to_parquet(tmp_path / "a.parquet")
    [pair] = HubData(path=str(tmp_path)).read()
    assert isinstance(pair, PreferencePair)
    assert pixel_hash(decode_rgb(pair.chosen)) == pixel_hash(photo(0))
    assert isinstance(decode_rgb(pair.rejected), Image.Image)


def test_shares_of_votes_are_labels(tmp_path: Path) -> None:
    """Rapidata: two images and the weighted share of votes for each."""
    columns = {
        "prompt": ["w", "x", "y", "z"],
        "image1": [{"bytes": it, "path": None} for it in (A, A, A, A)],
        "image2": [{"bytes": it, "path": None} for it in (B, C, D, D)],
        "weighted_results_image1_preference": [0.8, 0.25, 0.5, None],
        "weighted_results_image2_preference": [0.2, 0.75, 0.5, None],
    }
    settings = {"image_0_column": "image1", "image_1_column": "image2"}
    path = written(tmp_path, columns, "image1", "image2")
    first, second, third, fourth = HubData(
        path=path, label_column="weighted_results_image1_preference", **settings
    ).read()
    assert isinstance(first, PreferencePair) and isinstance(second, PreferencePair)
    assert (first.chosen, first.label_prob, first.chosen_origin) == (A, 0.8, {"position": 0})
    assert (second.chosen, second.label_prob, second.chosen_origin) == (C, 0.75, {"position": 1})
    assert isinstance(third, Dropped) and third.reason == "tie"
    assert isinstance(fourth, Dropped) and fourth.reason == "no label"
