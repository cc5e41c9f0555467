"""The latent cache gives back what the encoders made, survives being cut off, and is not used for other inputs."""

import hashlib
import json
import multiprocessing
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import Field

from diffusion_dpo.config import ConfigError
from diffusion_dpo.data import PairSource, PreferencePair, cache, encode
from diffusion_dpo.data.buckets import fit
from diffusion_dpo.data.collect import survey
from diffusion_dpo.data.encode import Encoders
from diffusion_dpo.data.images import decode_rgb
from diffusion_dpo.data.shards import encode_png
from diffusion_dpo.processes import Processes

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
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 127.5 - 1
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


def test_every_pair_has_the_conditioning_of_its_own_prompt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Which are of different lengths here, since length is what these encoders see."""
    monkeypatch.setattr(cache, "PROMPTS_PER_FILE", 2)
    pairs = [replace(pair, prompt="x" * (1 + 3 * (i % 4))) for i, pair in enumerate(make_pairs(6))]
    opened = build(tmp_path, pairs, CountingEncoders().make())
    found = opened.conditioning([0, 1, 2, 3, 4, 5, 2], [False] * 6 + [True])["text"]
    assert found.flatten().tolist() == [1, 4, 7, 10, 1, 4, 0]


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
    said = capsys.readouterr().out
    assert "cache: encoding 10 pairs and 4 prompts at 32 px into" in said
    assert "cache: 10 pairs at 32 px are encoded already in" in said
    build(tmp_path, pairs, counting.make())
    assert counting.images_seen == 28
    said = capsys.readouterr().out
    assert "is damaged" in said and "encoding 4 pairs and 0 prompts" in said
    sorted(tmp_path.rglob("pairs-*.safetensors"))[2].unlink()
    build(tmp_path, pairs, counting.make())
    assert "encoding 2 pairs and 0 prompts" in capsys.readouterr().out  # the last file is not full
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


@pytest.mark.parametrize(
    "change",
    ["fingerprint", "resolution", "dtype", "pairs", "order", "image", "prompt", "flip", "buckets", "channels"],
)
def test_other_inputs_get_another_cache(tmp_path: Path, change: str):
    pairs, encoders = make_pairs(4), CountingEncoders().make()
    build(tmp_path, pairs, encoders)
    if change == "fingerprint":
        encoders = replace(encoders, fingerprint="g")
    elif change == "dtype":
        encoders = replace(encoders, dtype=torch.float16)
    elif change == "pairs":
        pairs = pairs[1:]
    elif change == "order":
        pairs = pairs[::-1]
    elif change == "image":
        pairs[2] = replace(pairs[2], rejected=photo_of(40, 40, 1))
    elif change == "prompt":
        pairs[2] = replace(pairs[2], prompt="another prompt")
    elif change == "channels":
        encoders = replace(encoders, latent_channels=4, images=lambda images, noise: noise)
    elif change == "resolution":
        encoders = replace(encoders, resolution_px=64, images=lambda images, noise: noise)
    settings = {"bucket_step_px": 8} if change == "buckets" else {}
    build(tmp_path, pairs, encoders, random_flip=change == "flip", **settings)
    assert len(list(tmp_path.iterdir())) == 2


def test_a_cache_of_an_earlier_release_is_found_and_laid_out_as_it_was():
    """Whoever changes one of these makes the users' caches unreadable, unless the version in the facts changes too."""
    data, encoders = survey(Pairs(pairs=make_pairs(2))), CountingEncoders().make()
    facts = cache.facts_of(data, encoders, [(SIDE, SIDE), (48, 16)], random_flip=False)
    assert facts == {
        "format": "2",
        "encoders": "f",
        "dtype": "float32",
        "resolution_px": "32",
        "buckets_px": "32x32 48x16",
        "latents": "3 channels, 1/8 of the side",
        "mirrored": "as they are",
        "data": data.fingerprint,
    }
    name = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
    assert cache.folder_of(Path("root"), facts) == Path("root") / name
    assert (cache.PAIRS_PER_FILE, cache.PROMPTS_PER_FILE) == (256, 1024)
    assert (cache.pairs_file(3), cache.prompts_file(3)) == ("pairs-00003.safetensors", "prompts-00003.safetensors")


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


# --- trust -----------------------------------------------------------------------------------------------------------


def file_of(root: Path, name: str) -> Path:
    [path] = root.rglob(name)
    return path


@pytest.mark.parametrize(
    ("file", "what"), [("pairs-00001.safetensors", "pair "), ("prompts-00000.safetensors", "prompt 'prompt 2'")]
)
def test_changed_bytes_are_named_when_they_are_read_and_encoded_again_at_the_next_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str, what: str
):
    monkeypatch.setattr(cache, "PAIRS_PER_FILE", 4)
    pairs, counting = make_pairs(10), CountingEncoders()
    whole = read_all(build(tmp_path, pairs, counting.make(), random_flip=True), range(10))
    path = file_of(tmp_path, file)
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    opened = build(tmp_path, pairs, counting.make(), random_flip=True)
    with pytest.raises(ConfigError, match=f"{file} is damaged at {what}.*the same command encodes it again"):
        read_all(opened, range(10))
    assert not path.exists()
    seen = counting.images_seen
    again = read_all(build(tmp_path, pairs, counting.make(), random_flip=True), range(10))
    assert counting.images_seen - seen == (16 if what == "pair " else 0)
    assert all(torch.equal(one, other) for one, other in zip(whole, again, strict=True))


def read_all(opened: cache.LatentCache, indices: Sequence[int]) -> list[torch.Tensor]:
    """Everything that a cache knows of pairs of one bucket."""
    images = [(index, side) for index in indices for side in (0, 1)]
    found = [opened.latents(images, [flip] * len(images)) for flip in (False, True)]
    conditioning = [opened.conditioning(list(indices), [drop] * len(indices)) for drop in (False, True)]
    return [*found, *(tensor for part in conditioning for tensor in part.values())]


def test_no_changed_byte_goes_unnoticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Wherever in a file it is: in the header, in a checksum or in a tensor."""
    monkeypatch.setattr(cache, "PAIRS_PER_FILE", 4)
    pairs, counting = make_pairs(4), CountingEncoders()
    whole = read_all(build(tmp_path, pairs, counting.make(), random_flip=True), range(4))
    path = file_of(tmp_path, "pairs-00000.safetensors")
    content = path.read_bytes()
    header = int.from_bytes(content[:8], "little")
    for place in [*range(0, 8 + header, 7), *np.linspace(8 + header, len(content) - 1, 60).astype(int)]:
        data = bytearray(content)
        data[place] ^= 1 + place % 7
        path.write_bytes(data)
        try:
            again = read_all(build(tmp_path, pairs, counting.make(), random_flip=True), range(4))
        except ConfigError:
            continue
        assert all(torch.equal(one, other) for one, other in zip(whole, again, strict=True))
        assert path.read_bytes() == content


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("encoders", r"another VAE or text encoders \(encoders: 'g' there, 'f' here\)"),
        ("resolution", r"another resolution \(resolution_px: '64' there, '32' here\)"),
        ("dtype", r"another precision \(dtype: 'float16' there, 'float32' here\)"),
        ("data", r"another data \(data: "),
    ],
)
@pytest.mark.parametrize("what", ["folder", "file"])
def test_a_cache_of_something_else_under_this_name_is_refused(tmp_path: Path, change: str, words: str, what: str):
    pairs, encoders = make_pairs(4), CountingEncoders().make()
    build(tmp_path / "mine", pairs, encoders)
    others = {
        "encoders": replace(encoders, fingerprint="g"),
        "resolution": replace(encoders, resolution_px=64),
        "dtype": replace(encoders, dtype=torch.float16),
        "data": encoders,
    }
    build(tmp_path / "other", pairs[: 3 if change == "data" else 4], others[change])
    mine, other = (next((tmp_path / name).iterdir()) for name in ("mine", "other"))
    if what == "folder":
        shutil.rmtree(mine)
        shutil.copytree(other, mine)
    else:
        shutil.copy(other / "pairs-00000.safetensors", mine)
    with pytest.raises(ConfigError, match=words + ".*remove it, or choose another cache_dir"):
        build(tmp_path / "mine", pairs, encoders)


def test_a_file_under_the_name_of_another_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cache, "PAIRS_PER_FILE", 2)
    pairs, encoders = make_pairs(4), CountingEncoders().make()
    build(tmp_path, pairs, encoders)
    first, second = sorted(tmp_path.rglob("pairs-*.safetensors"))
    shutil.copy(first, second)
    with pytest.raises(ConfigError, match="another part of the cache"):
        build(tmp_path, pairs, encoders)


def test_facts_are_said_in_words_and_written_again_when_they_are_lost(tmp_path: Path):
    pairs, encoders = make_pairs(2), CountingEncoders().make()
    build(tmp_path, pairs, encoders)
    path = file_of(tmp_path, "facts.json")
    facts = json.loads(path.read_text())
    assert (facts["encoders"], facts["resolution_px"], facts["dtype"]) == ("f", "32", "float32")
    path.write_text("{")
    build(tmp_path, pairs, encoders)
    assert json.loads(path.read_text()) == facts


def test_a_file_that_is_gone_while_it_is_needed_is_named(tmp_path: Path):
    opened = build(tmp_path, make_pairs(2), CountingEncoders().make())
    file_of(tmp_path, "pairs-00000.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"pairs-00000.safetensors is damaged at pair .*No such file"):
        opened.latents([(0, 0)], [False])


# --- processes, forks and open files ---------------------------------------------------------------------------------


def test_every_missing_file_is_made_by_exactly_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Two processes one after the other, the first of which has said what is missing."""
    monkeypatch.setattr(cache, "PAIRS_PER_FILE", 2)
    monkeypatch.setattr(cache, "PROMPTS_PER_FILE", 2)
    pairs, alone = make_pairs(11), CountingEncoders()
    build(tmp_path / "alone", pairs, alone.make())
    said: list = []
    waited: list[int] = []

    class Rank(Processes):
        def wait(self) -> None:
            waited.append(self.rank)
            written = {path.name for path in (tmp_path / "both").rglob("*.safetensors")}
            assert self.rank == 0 or written == {path.name for path in (tmp_path / "alone").rglob("*.safetensors")}

        def from_main(self, value: object) -> object:
            said.append(value)
            assert (value is None) == (self.rank == 1)
            return said[0]

    made = [CountingEncoders(), CountingEncoders()]
    for rank, counting in enumerate(made):
        build(tmp_path / "both", pairs, counting.make(), processes=Rank(rank, 2))
    assert [it.images_seen for it in made] == [12, 10]
    assert waited == [0, 1]  # each for the other, before it opens what both made
    assert sum(it.texts_seen for it in made) == alone.texts_seen == 4
    files = [{path.name: path.read_bytes() for path in (tmp_path / it).rglob("*.*")} for it in ("alone", "both")]
    assert files[0] == files[1]


def test_few_files_are_open_whatever_their_number_and_a_fork_may_read_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(cache, "PAIRS_PER_FILE", 1)
    monkeypatch.setattr(cache, "_MAX_OPEN_FILES", 3)
    opened = build(tmp_path, make_pairs(20), CountingEncoders().make(), random_flip=True)
    before = len(os.listdir("/proc/self/fd"))
    whole = read_all(opened, range(20))
    assert len(os.listdir("/proc/self/fd")) - before <= 4

    def read_in_child(results) -> None:
        torch.set_num_threads(1)
        results.put([tensor.numpy() for tensor in read_all(opened, range(20))])

    context = multiprocessing.get_context("fork")
    results = context.Queue()
    children = [context.Process(target=read_in_child, args=(results,)) for _ in range(2)]
    for child in children:
        child.start()
    for _ in range(3):
        assert all(torch.equal(one, other) for one, other in zip(whole, read_all(opened, range(20)), strict=True))
    for _ in children:
        assert all(
            np.array_equal(one.numpy(), other) for one, other in zip(whole, results.get(timeout=60), strict=True)
        )
    for child in children:
        child.join()


# --- buckets ---------------------------------------------------------------------------------------------------------

SHAPES = [(64, 64), (96, 48), (48, 96), (64, 66), (200, 100), (33, 64), (80, 80), (100, 40)]
"""Sizes (width, height) of the chosen images; those of the rejected are a little wider."""


def bucketed(root: Path, counting: CountingEncoders) -> tuple[list[PreferencePair], cache.LatentCache]:
    pairs = [
        PreferencePair(f"pair-{i}", "x", photo_of(width, height, i), photo_of(width + 3, height, 100 + i))
        for i, (width, height) in enumerate(SHAPES * 2)
    ]
    return pairs, build(root, pairs, replace(counting.make(), resolution_px=64), random_flip=True, bucket_step_px=16)


def test_both_images_of_a_pair_are_in_one_bucket_whose_latents_come_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(cache, "PAIRS_PER_FILE", 6)
    counting = CountingEncoders()
    pairs, opened = bucketed(tmp_path, counting)
    buckets = [(48, 80), (64, 64), (80, 48)]
    assert opened.shapes == [(3, height // 8, width // 8) for width, height in buckets]
    assert opened.bucket_of.tolist() == [1, 2, 0, 1, 2, 0, 1, 2] * 2
    assert {shape[2:] for shape in counting.shapes_seen} == {(height, width) for width, height in buckets}
    for bucket, size in enumerate(buckets):
        inside = np.flatnonzero(opened.bucket_of == bucket).tolist()[::-1]
        for side, name in enumerate(("chosen", "rejected")):
            plain = opened.latents([(i, side) for i in inside], [False] * len(inside))
            for i, latents in zip(inside, plain, strict=True):
                image = np.asarray(fit(decode_rgb(getattr(pairs[i], name)), size))
                pixels = torch.tensor(image).permute(2, 0, 1)[None].float() / 127.5 - 1
                torch.testing.assert_close(latents, torch.nn.functional.avg_pool2d(pixels, 8)[0])
            mirrored = opened.latents([(i, side) for i in inside], [True] * len(inside))
            torch.testing.assert_close(mirrored, plain.flip(3))


def test_each_image_has_its_own_size_and_crop(tmp_path: Path):
    _, opened = bucketed(tmp_path, CountingEncoders())
    found = opened.sizes([(1, 0), (1, 1), (3, 0), (5, 1)])
    assert found.dtype == torch.int64
    assert found.tolist() == [
        [48, 96, 0, 8, 48, 80],  # 96 x 48: as high as the bucket, 16 px too wide
        [48, 99, 0, 10, 48, 80],  # 99 x 48: 19 too wide; halves go to the even number, as in the script of diffusers
        [66, 64, 1, 0, 64, 64],
        [64, 36, 2, 0, 80, 48],  # 36 x 64, scaled to 48 x 85
    ]


def test_with_buckets_a_mask_that_is_black_where_it_counts_is_named(tmp_path: Path):
    """A mask of the middle square that the bucket cuts off: the survey cannot know."""
    strip = np.zeros((66, 60), np.uint8)
    strip[:4] = 255
    pair = PreferencePair(
        "pair", "x", photo_of(60, 66, 0), photo_of(60, 66, 1), mask=encode_png(Image.fromarray(strip)), where="row 7"
    )
    wide = CountingEncoders().make()
    assert build(tmp_path, [pair], wide).masks([(0, 0)], [False]) is not None
    with pytest.raises(ConfigError, match=r"row 7: the mask is all black in the part of 64 x 56 px"):
        encode._encode_mask(pair, (64, 56), wide, random_flip=False)
