"""Every kind of image that people have becomes RGB, or is refused in a few words."""

import io
import random
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

from diffusion_dpo.data.images import BrokenImage, decode_rgb, image_bytes, pixel_hash
from tests.photos import encode, jpeg, photo


def test_photograph_keeps_its_pixels():
    image = photo(0)
    decoded = decode_rgb(encode(image, "PNG"))
    assert decoded.mode == "RGB"
    assert np.array_equal(np.asarray(decoded), np.asarray(image))


NOT_DECODED = ", which is not decoded here; convert it to PNG or JPEG"


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_gray_and_print_colours_become_rgb(mode):
    decoded = decode_rgb(jpeg(1, mode=mode))
    assert decoded.mode == "RGB"
    expected = photo(1, mode=mode).convert("RGB")
    assert np.abs(np.asarray(decoded, float) - np.asarray(expected, float)).mean() < 6


def test_sixteen_bits_are_scaled_and_not_clipped():
    gray = np.asarray(photo(2, mode="L"))
    data = encode(Image.fromarray(gray.astype(np.uint16) * 256 + 100), "PNG")
    decoded = np.asarray(decode_rgb(data))[..., 0]
    assert np.abs(decoded.astype(int) - gray).max() <= 1


def test_transparency_lies_over_white():
    image = photo(0).convert("RGBA")
    image.putalpha(Image.new("L", image.size, 0))
    assert decode_rgb(encode(image, "PNG")).getextrema() == ((255, 255),) * 3


def test_palette_with_a_transparent_colour_lies_over_white():
    image = Image.new("P", (40, 40), 0)
    image.putpalette([200, 0, 0, 0, 200, 0])
    image.paste(1, (0, 0, 20, 40))
    decoded = decode_rgb(encode(image, "PNG", transparency=0))
    assert decoded.getpixel((0, 0)) == (0, 200, 0)
    assert decoded.getpixel((39, 0)) == (255, 255, 255)


def test_exif_rotation_is_applied():
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright
    decoded = decode_rgb(encode(photo(0, (96, 64)), "JPEG", exif=exif))
    assert decoded.size == (64, 96)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_undone_once(kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = encode(photo(0, (96, 64)), kind, exif=exif)
    with Image.open(io.BytesIO(stored)) as image:
        expected = ImageOps.exif_transpose(image).convert("RGB")
    assert np.array_equal(np.asarray(decode_rgb(stored)), np.asarray(expected))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["PNG", "WEBP", "JPEG"])
def test_damaged_exif_does_not_cost_the_image(kind):
    exif = Image.Exif()
    exif[0x0112], exif[0x0110], exif[0x011A] = 1, "a camera", 72.0
    whole, rng = exif.tobytes(), random.Random(0)
    for _ in range(60):
        damaged = bytearray(whole)
        for _ in range(4):
            damaged[rng.randrange(6, len(damaged))] = rng.randrange(256)
        assert set(decode_rgb(encode(photo(3), kind, exif=bytes(damaged))).size) == {96, 64}


@pytest.mark.parametrize("error", [TypeError, AttributeError, OverflowError, KeyError, ZeroDivisionError])
def test_exif_that_cannot_be_read_means_upright(error, monkeypatch):
    def fail(image):
        raise error

    monkeypatch.setattr(Image.Image, "getexif", fail)
    assert decode_rgb(encode(photo(0), "BMP")).size == (96, 64)


def test_first_frame_of_an_animation():
    frames = [Image.new("RGB", (40, 40), colour) for colour in ("red", "blue")]
    data = encode(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert decode_rgb(data).getpixel((5, 5)) == (255, 0, 0)


@pytest.mark.parametrize(
    "data, words",
    [
        (jpeg(0)[:700], "truncated image file"),
        (encode(photo(0), "PNG")[:2000], "truncated image file"),
        (b"", "not an image file"),
        (b"hello", "not an image file"),
        (b"<!DOCTYPE html><html>not found</html>", "a web page or SVG, not an image file"),
        (b'<svg xmlns="http://www.w3.org/2000/svg"/>', "a web page or SVG, not an image file"),
        (
            b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 50 50\n",
            "PostScript, which is not decoded here; convert it to PNG or JPEG",
        ),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", f"HEIC{NOT_DECODED}"),
        (b"\0\0\0\x18ftypmif1\0\0\0\0mif1heic", f"HEIC{NOT_DECODED}"),
        (b"\0\0\0\x0cJXL \r\n\x87\n\0", f"JPEG XL{NOT_DECODED}"),
        (b"\xff\x0a\xfa\x1f", f"JPEG XL{NOT_DECODED}"),
        (b"\0\0\0\x0cjP  \r\n\x87\n\0", f"JPEG 2000{NOT_DECODED}"),
        (b"\xff\x4f\xff\x51\0", f"JPEG 2000{NOT_DECODED}"),
        (b"8BPS\0\1", f"a Photoshop file{NOT_DECODED}"),
        (b"\0\0\0\x18ftypisom\0\0\2\0", f"a video{NOT_DECODED}"),
        (jpeg(0, (31, 200)), "smaller than 32 px"),
        (jpeg(0, (1, 5000)), "smaller than 32 px"),
    ],
)
def test_what_cannot_be_used_says_why(data, words):
    with pytest.raises(BrokenImage, match=f"^{words}$"):
        decode_rgb(data)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("size", [(20_000, 20_000), (12_000, 12_000), (10_001, 10_000)])
def test_huge_image_is_refused_by_its_header(size):
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", *size, 8, 2, 0, 0, 0))
    with pytest.raises(BrokenImage, match="larger than 100 megapixels"):
        decode_rgb(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", b"") + chunk(b"IEND", b""))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF"])
def test_damage_anywhere_raises_nothing_but_broken_image(kind, capfd):
    whole = encode(photo(3), kind)
    assert decode_rgb(whole).size == (96, 64)
    rng = random.Random(0)
    broken = 0
    for trial in range(60):
        data = bytearray(whole[: rng.randrange(len(whole))] if trial % 3 == 0 else whole)
        for _ in range(5 if data else 0):
            data[rng.randrange(min(len(data), 300))] = rng.randrange(256)
        try:
            decode_rgb(bytes(data))
        except BrokenImage:
            broken += 1
    assert broken


def test_pixel_hash_is_of_the_pixels():
    image = photo(0)
    assert (
        pixel_hash(image)
        == pixel_hash(decode_rgb(encode(image, "PNG")))
        == pixel_hash(decode_rgb(encode(image, "BMP")))
    )
    assert pixel_hash(image) != pixel_hash(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT))
    blank = Image.new("RGB", (40, 60))
    assert pixel_hash(blank) != pixel_hash(Image.new("RGB", (60, 40)))
    assert len(pixel_hash(blank)) == 32


def test_image_columns_hold_bytes_and_never_a_path(tmp_path):
    secret = tmp_path / "secret.png"
    photo(0).save(secret)
    data = jpeg(0)
    assert image_bytes(data) == image_bytes({"bytes": data, "path": None}) == data
    assert image_bytes({"bytes": data, "path": str(secret)}) == data
    for value in ({"bytes": None, "path": str(secret)}, {"path": str(secret)}, str(secret)):
        with pytest.raises(BrokenImage, match="a path instead of image bytes"):
            image_bytes(value)
    for value in (None, {}, {"bytes": None, "path": None}, b""):
        with pytest.raises(BrokenImage, match="no image"):
            image_bytes(value)
    with pytest.raises(BrokenImage, match="not image bytes"):
        image_bytes(7)
