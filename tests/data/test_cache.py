"""The latent cache gives back what the encoders made, survives being cut off, and is not used for other inputs."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import Field

from diffusion_dpo.data import PairSource, PreferencePair, cache
from diffusion_dpo.data.buckets import fit
from diffusion_dpo.data.collect import survey
from diffusion_dpo.data.encode import Encoders
from diffusion_dpo.data.images import decode_rgb
from diffusion_dpo.data.shards import encode_png

SIDE = 32


def photo_of(width: int, height: int, seed: int) -> bytes:
    noise = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return encode_png(Image.fromarray(noise))


def make_pairs(count: int) -> list[PreferencePair]:
    rng = np.random.default_rng(0)

    def noise_image() -> bytes:
        width, height = rng.integers(SIDE, 2 * SIDE, 2)
        return encode_png(Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8)))

    return [PreferencePair(f"pair-{i}", f"prompt {i % 3}", noise_image(), noise_image()) for i in range(count)]


class CountingEncoders:
    """Encoders that are easy to check: latents are the image in small, conditioning is the text's length.

    Two tensors a prompt, as SDXL has them.
    """

    def __init__(self) -> None:
        self.images_seen = 0
        self.texts_seen = 0
        self.shapes_seen: list[tuple[int, ...]] = []

    def encode(self, images: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        self.images_seen += len(images)
        self.shapes_seen.append(tuple(images.shape))
        assert images.min() >= -1
        assert images.max() <= 1
        return torch.nn.functional.avg_pool2d(images, 8) + 0 * noise[:, :3]

    def read(self, texts: Sequence[str]) -> dict[str, torch.Tensor]:
        self.texts_seen += len(texts)
        lengths = torch.tensor([float(len(text)) for text in texts])
        return {"text": lengths[:, None], "long_text": lengths[:, None, None].expand(-1, 5, 2)}

    def make(self) -> Encoders:
        return Encoders(
            images=self.encode,
            prompts=self.read,
            fingerprint="f",
            latent_channels=3,
            downscale=8,
            resolution_px=SIDE,
            dtype=torch.float32,
            batch_size=4,
        )


class Pairs(PairSource):
    """Pairs as they are."""

    pairs: list = Field([], exclude=True)

    def read(self) -> Iterator[PreferencePair]:
        yield from self.pairs


def build(root: Path, pairs: list[PreferencePair], encoders: Encoders, *, random_flip: bool = False, **settings):
    return cache.build(root, survey(Pairs(pairs=pairs)), encoders, random_flip=random_flip, **settings)


def expected_latents(pair: PreferencePair, side: str, encoders: Encoders) -> torch.Tensor:
    image = fit(decode_rgb(getattr(pair, side)), (SIDE, SIDE))
    pixels = torch.from_numpy(np.asarray(image)).permute(2, 0, 1)[None].float() / 127.5 - 1
    return encoders.images(pixels, torch.zeros(1, 3, 4, 4))[0]


def test_latents_and_conditioning_belong_to_their_pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cache, "PAIRS_PER_FILE", 5)
    monkeypatch.setattr(cache, "PROMPTS_PER_FILE", 2)
    pairs, encoders = make_pairs(13), CountingEncoders().make()
    opened = build(tmp_path, pairs, encoders)
    wanted = [12, 0, 7]
    for side, name in enumerate(("chosen", "rejected")):
        latents = opened.latents([(index, side) for index in wanted], [False] * 3)
        for row, index in enumerate(wanted):
            torch.testing.assert_close(latents[row], expected_latents(pairs[index], name, encoders))
    assert opened.conditioning([0, 1], [False, True])["text"].tolist() == [[8.0], [0.0]]
    assert opened.conditioning([1], [False])["long_text"].tolist() == [[[8.0, 8.0]] * 5]


def test_flipped_latents_are_those_of_the_mirrored_images(tmp_path: Path):
    pairs, encoders = make_pairs(3), CountingEncoders().make()
    opened = build(tmp_path, pairs, encoders, random_flip=True)
    plain, mirrored = (opened.latents([(1, 0), (1, 1)], [flip] * 2) for flip in (False, True))
    torch.testing.assert_close(plain.flip(3), mirrored)


def test_an_image_judged_by_itself_has_no_other_side(tmp_path: Path):
    pairs, encoders = make_pairs(3), CountingEncoders().make()
    pairs[1] = replace(pairs[1], chosen=b"")
    opened = build(tmp_path, pairs, encoders)
    absent, present = opened.latents([(1, 0), (1, 1)], [False] * 2)
    assert not absent.any()
    torch.testing.assert_close(present, expected_latents(pairs[1], "rejected", encoders))


def test_a_second_build_encodes_nothing_and_a_damaged_file_alone_is_made_again(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setattr(cache, "PAIRS_PER_FILE", 4)
    pairs, counting = make_pairs(10), CountingEncoders()
    build(tmp_path, pairs, counting.make())
    assert counting.images_seen == 20
    files = {path: path.read_bytes() for path in tmp_path.rglob("*.safetensors")}
    build(tmp_path, pairs, counting.make())
    assert counting.images_seen == 20
    damaged = sorted(tmp_path.rglob("pairs-*.safetensors"))[1]
    damaged.write_bytes(files[damaged][:-7])
    build(tmp_path, pairs, counting.make())
    assert counting.images_seen == 28
    assert "is damaged" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.safetensors")} == files


def test_an_interrupted_build_keeps_its_whole_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cache, "PAIRS_PER_FILE", 4)
    pairs, counting = make_pairs(10), CountingEncoders()

    def stopping(images: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        if counting.images_seen >= 12:
            raise KeyboardInterrupt
        return counting.encode(images, noise)

    with pytest.raises(KeyboardInterrupt):
        build(tmp_path, pairs, replace(counting.make(), images=stopping))
    assert [path.name for path in tmp_path.rglob("*.safetensors")] == ["pairs-00000.safetensors"]
    build(tmp_path, pairs, counting.make())
    assert counting.images_seen == 12 + 12


@pytest.mark.parametrize("change", ["fingerprint", "resolution", "dtype", "pairs", "flip"])
def test_other_inputs_get_another_cache(tmp_path: Path, change: str):
    pairs, encoders = make_pairs(4), CountingEncoders().make()
    build(tmp_path, pairs, encoders)
    if change == "fingerprint":
        encoders = replace(encoders, fingerprint="g")
    elif change == "dtype":
        encoders = replace(encoders, dtype=torch.float16)
    elif change == "pairs":
        pairs = pairs[1:]
    elif change == "resolution":
        encoders = replace(encoders, resolution_px=64, images=lambda images, noise: noise)
    build(tmp_path, pairs, encoders, random_flip=change == "flip")
    assert len(list(tmp_path.iterdir())) == 2


def test_masks_are_cropped_shrunk_and_mirrored_like_their_images(tmp_path: Path):
    """White on the left third of a wide image: the crop leaves a part of it, with mean 1 over the square."""
    pairs, encoders = make_pairs(2), CountingEncoders().make()
    picture = np.zeros((2 * SIDE, 4 * SIDE), np.uint8)
    picture[:, : 3 * SIDE // 2] = 255
    pairs[1] = replace(pairs[1], chosen=photo_of(4 * SIDE, 2 * SIDE, 1), rejected=photo_of(4 * SIDE, 2 * SIDE, 2))
    pairs[1] = replace(pairs[1], mask=encode_png(Image.fromarray(picture)))
    opened = build(tmp_path, pairs, encoders, random_flip=True)
    plain, masked, mirrored = opened.masks([(0, 1), (1, 0), (1, 1)], [False, False, True])
    assert torch.equal(plain, torch.ones(1, 4, 4))
    assert masked.tolist() == [[[4.0, 0.0, 0.0, 0.0]] * 4]
    assert torch.equal(mirrored, masked.flip(2))


def test_without_masks_there_are_none(tmp_path: Path):
    assert build(tmp_path, make_pairs(2), CountingEncoders().make()).masks([(0, 0)], [False]) is None
