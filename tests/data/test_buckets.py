"""Buckets: no image is distorted, both of a pair share one, and squares are the case of one bucket."""

import math

import numpy as np
import pytest
from PIL import Image

from diffusion_dpo.config import ConfigError
from diffusion_dpo.data.buckets import choose_buckets, crop_box, crop_offsets, fit, make_buckets
from diffusion_dpo.data.images import middle_square

SIZES = [(64, 64), (100, 64), (64, 100), (33, 47), (500, 31), (31, 500), (1000, 667), (1024, 1024), (97, 1600)]


@pytest.mark.parametrize("resolution, step", [(1024, 64), (512, 64), (512, 8), (64, 16), (64, 64), (768, 32)])
def test_buckets_fill_the_area_within_the_aspects_and_none_covers_another(resolution: int, step: int):
    buckets = make_buckets(resolution, step)
    everything = [
        (width, height)
        for width in range(step, 2 * resolution + 1, step)
        for height in range(step, 2 * resolution + 1, step)
        if width * height <= resolution**2 and 1 / 2 <= width / height <= 2
    ]
    assert (resolution, resolution) in buckets
    assert buckets == sorted(set(buckets))
    assert set(buckets) <= set(everything)
    assert [bucket[::-1] for bucket in reversed(buckets)] == buckets
    for size in everything:
        covering = [bucket for bucket in buckets if bucket[0] >= size[0] and bucket[1] >= size[1]]
        assert covering
        assert (size in buckets) == (covering == [size])


def test_a_resolution_that_is_no_multiple_of_the_step_is_refused():
    with pytest.raises(ConfigError, match=r"resolution_px is 500.*multiple of bucket_step_px = 64"):
        make_buckets(500, 64)


def test_a_pair_is_in_the_bucket_nearest_to_the_geometric_mean_of_its_aspects():
    buckets = make_buckets(1024, 64)
    rng = np.random.default_rng(0)
    chosen, rejected = rng.integers(32, 2000, (2, 500, 2))
    rejected[:50] = 0
    chosen[50:100] = 0
    found = choose_buckets(buckets, chosen, rejected)
    for pair, number in enumerate(found):
        logs = [math.log(w / h) for w, h in (chosen[pair], rejected[pair]) if w]
        distance = [abs(math.log(w / h) - sum(logs) / len(logs)) for w, h in buckets]
        assert distance[number] == pytest.approx(min(distance), abs=1e-12)
    assert (
        choose_buckets(buckets, chosen[100:], rejected[100:]) == choose_buckets(buckets, rejected, chosen)[100:]
    ).all()
    assert not choose_buckets([(64, 64)], chosen, rejected).any()


@pytest.mark.parametrize("size", SIZES)
def test_the_square_is_the_middle_square_exactly(size: tuple[int, int]):
    assert crop_box(size, (512, 512)) == middle_square(size)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("bucket", [(64, 64), (48, 80), (80, 48), (704, 1408)])
def test_the_crop_has_the_shape_of_the_bucket_and_is_the_largest_in_the_middle(
    size: tuple[int, int], bucket: tuple[int, int]
):
    left, top, right, bottom = crop_box(size, bucket)
    assert (right - left) / (bottom - top) == pytest.approx(bucket[0] / bucket[1])
    assert (left + right, top + bottom) == pytest.approx(size)
    assert min(left, top) == pytest.approx(0)
    assert min(left, top) >= 0


@pytest.mark.parametrize("bucket", [(64, 64), (48, 80), (80, 48)])
@pytest.mark.parametrize("size", [(200, 100), (100, 200), (160, 160)])
def test_a_circle_stays_a_circle(size: tuple[int, int], bucket: tuple[int, int]):
    y, x = np.mgrid[: size[1], : size[0]]
    disc = np.hypot(x + 0.5 - size[0] / 2, y + 0.5 - size[1] / 2) < 25
    picture = np.asarray(fit(Image.fromarray((disc * 255).astype(np.uint8)).convert("RGB"), bucket))[:, :, 0] > 127
    assert picture.shape == bucket[::-1]
    assert abs(int(picture.any(0).sum()) - int(picture.any(1).sum())) <= 2


@pytest.mark.parametrize("size", [(64, 32), (32, 64), (33, 47), (500, 31)])
def test_the_crop_is_the_middle_of_the_scaled_image(size: tuple[int, int]):
    gradient = np.zeros((size[1], size[0], 3), dtype=np.uint8)
    gradient[:, :, 0] = np.linspace(0, 255, size[0])[None]
    gradient[:, :, 1] = np.linspace(0, 255, size[1])[:, None]
    square = np.asarray(fit(Image.fromarray(gradient), (32, 32)), dtype=float)
    assert square.shape == (32, 32, 3)
    assert square[:, :, :2].mean((0, 1)) == pytest.approx([127.5, 127.5], abs=6)


def test_offsets_are_those_of_the_script_of_diffusers():
    """Its steps: Resize(resolution) of the shorter side, then a crop at max(0, int(round((size - side) / 2)))."""
    from torchvision.transforms import Resize

    for size in [*SIZES, (1201, 907), (641, 1023)]:
        scaled = Resize(512)(Image.new("RGB", size))
        expected = [max(0, round((length - 512) / 2.0)) for length in (scaled.height, scaled.width)]
        assert crop_offsets(np.array([size]), np.array([[512, 512]])).tolist() == [expected]


def test_offsets_agree_with_the_crop_in_every_bucket():
    buckets = make_buckets(512, 64)
    for size in SIZES:
        for bucket in buckets:
            left, top, right, _ = crop_box(size, bucket)
            scale = bucket[0] / (right - left)
            [offsets] = crop_offsets(np.array([size]), np.array([bucket])).tolist()
            assert offsets == pytest.approx([top * scale, left * scale], abs=1.01)
