"""Judges without weights: brightness, saturation, colorfulness, sharpness."""

import numpy as np
import pytest
from PIL import Image, ImageFilter
from scipy import ndimage

from diffusion_dpo.scorers.brightness import brightness
from diffusion_dpo.scorers.colorfulness import Colorfulness, colorfulness
from diffusion_dpo.scorers.saturation import saturation
from diffusion_dpo.scorers.sharpness import Sharpness, sharpness
from tests.photos import photo


def _flat(*color: int) -> Image.Image:
    return Image.new("RGB", (40, 30), color)


def _checkers(*colors: tuple[int, int, int], side: int = 256) -> Image.Image:
    squares = np.indices((side, side)).sum(axis=0) % len(colors)
    return Image.fromarray(np.array(colors, np.uint8)[squares])


def test_flat_colours() -> None:
    assert [brightness(_flat(v, v, v)) for v in (0, 51, 255)] == pytest.approx([0, 0.2, 1])
    assert [saturation(_flat(*c)) for c in ((0, 0, 0), (90, 90, 90), (200, 100, 150), (7, 0, 0))] == [0, 0, 0.5, 1]
    assert colorfulness(_flat(90, 90, 90)) == 0
    assert colorfulness(_flat(200, 100, 50)) == pytest.approx(0.3 * np.hypot(100, 100))
    assert sharpness(_flat(200, 100, 150)) == 0


def test_colorfulness_is_the_equation_of_the_paper() -> None:
    red, blue = np.array([255, 0]), np.array([0, 255])
    rg, yb = red, red / 2 - blue
    expected = np.sqrt(rg.std() ** 2 + yb.std() ** 2) + 0.3 * np.sqrt(rg.mean() ** 2 + yb.mean() ** 2)
    assert colorfulness(_checkers((255, 0, 0), (0, 0, 255))) == pytest.approx(expected)


def test_no_image_leaves_the_range() -> None:
    corners = [(r, g, b) for r in (0, 255) for g in (0, 255) for b in (0, 255)]
    most = max(colorfulness(_checkers(a, b)) for a in corners for b in corners)
    low, high = Colorfulness(type="colorfulness").metrics[0].range
    assert low < 0.7 * high < most <= high
    assert sharpness(_checkers((0, 0, 0), (255, 255, 255))) == pytest.approx(
        Sharpness(type="sharpness").metrics[0].range[1]
    )


def test_sharpness_is_the_variance_of_the_laplacian() -> None:
    image = photo(0, (256, 256))
    laplacian = ndimage.laplace(np.asarray(image.convert("L"), float))[1:-1, 1:-1]
    assert sharpness(image) == pytest.approx(np.log10(1 + laplacian.var()))


def test_sharpness_falls_with_blur_and_not_with_size() -> None:
    image = photo(0, (320, 240))
    blurred = [sharpness(image.filter(ImageFilter.GaussianBlur(radius))) for radius in (0, 1, 2, 4)]
    assert blurred == sorted(blurred, reverse=True)
    assert blurred[0] - blurred[-1] > 1
    larger = image.resize((640, 480), Image.Resampling.BICUBIC)
    assert abs(sharpness(larger) - blurred[0]) < 0.2 < abs(blurred[1] - blurred[0])


@pytest.mark.parametrize("size", [(1, 1), (1, 3000), (3000, 1)])
def test_any_size(size: tuple[int, int]) -> None:
    for measure in (brightness, saturation, colorfulness, sharpness):
        assert np.isfinite(measure(Image.new("RGB", size, (10, 200, 30))))
