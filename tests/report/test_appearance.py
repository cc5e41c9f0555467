"""What is seen of an image: blank ones, and images that look like another one."""

import io

import numpy as np
import pytest
from PIL import Image, ImageDraw

from diffusion_dpo.report.appearance import look_at, near_duplicates
from diffusion_dpo.scorers.brightness import brightness
from tests.photos import encode, photo


def cells(image: Image.Image) -> bytes:
    return look_at(image, encode(image, "PNG")).cells


def disc(colour: str, at: int = 10) -> Image.Image:
    image = Image.new("RGB", (64, 64), "white")
    ImageDraw.Draw(image).ellipse((at, 20, at + 24, 44), fill=colour)
    return image


def test_the_numbers_are_those_of_the_scorers_and_of_the_file() -> None:
    image = photo(0, (200, 120))
    data = encode(image, "WEBP")
    seen = look_at(image, data)
    assert seen.numbers["brightness"] == brightness(image)
    assert (seen.num_bytes, seen.format, seen.size_px) == (len(data), "WEBP", (200, 120))
    assert seen.numbers["pixels"] == 24_000 and seen.numbers["aspect ratio"] == pytest.approx(200 / 120)
    large = look_at(photo(0, (2000, 1200)), data)
    assert large.brightness == pytest.approx(seen.brightness, abs=0.01)
    assert large.colorfulness == pytest.approx(seen.colorfulness, rel=0.1)


@pytest.mark.parametrize("colour,is_blank", [("black", True), ("white", True), ("gray", True)])
def test_one_colour_is_blank(colour: str, is_blank: bool) -> None:
    assert look_at(Image.new("RGB", (64, 64), colour), encode(photo(0))).is_blank == is_blank
    assert not look_at(disc("black"), encode(photo(0))).is_blank


@pytest.mark.parametrize("number", range(4))
def test_the_same_picture_saved_resized_or_a_little_noisy_is_nearly_the_same(number: int) -> None:
    image = photo(number, (256, 256))
    noise = np.random.default_rng(0).normal(0, 4, (256, 256, 3))
    noisy = Image.fromarray(np.clip(np.asarray(image) + noise, 0, 255).astype(np.uint8))
    jpeg = Image.open(io.BytesIO(encode(image, "JPEG", quality=60)))
    for other in (jpeg, image.resize((200, 200)), noisy):
        assert near_duplicates([cells(image), cells(other)]) == 1


def test_different_pictures_recoloured_and_moved_ones_are_not() -> None:
    assert near_duplicates([cells(photo(number, (256, 256))) for number in range(4)]) == 0
    assert near_duplicates([cells(disc(colour)) for colour in ("red", "green", "blue", "orange")]) == 0
    assert near_duplicates([cells(disc("red", at)) for at in (4, 16, 28)]) == 0
    assert near_duplicates([cells(photo(0)), cells(photo(0).transpose(Image.Transpose.FLIP_LEFT_RIGHT))]) == 0


def test_faint_pictures_that_differ_are_not_either() -> None:
    faint = [np.random.default_rng(seed).choice([124, 132], (8, 9, 3)).astype(np.uint8) for seed in range(3)]
    assert (
        near_duplicates([cells(Image.fromarray(it).resize((72, 64), Image.Resampling.NEAREST)) for it in faint]) == 0
    )


def test_each_repeat_counts_once() -> None:
    a, b = cells(photo(0)), cells(photo(1))
    assert near_duplicates([]) == near_duplicates([a]) == 0
    assert near_duplicates([a, b, a, a, b]) == 3
