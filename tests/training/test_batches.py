"""A micro-batch is the examples of its place in the step, each with its own images, labels, weight and randomness."""

import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from diffusion_dpo.config import ConfigError
from diffusion_dpo.data.examples import Example
from diffusion_dpo.data.order import Visit, draw_randomness
from diffusion_dpo.processes import Processes
from diffusion_dpo.settings import TrainConfig
from diffusion_dpo.training.batches import Reader, _leave_signals_to_the_parent, gather
from tests.runs import make_config

SHAPES = [(4, 2, 3), (4, 3, 2)]


class KnownCache:
    """Everything says which pair, which side and whether mirrored; pairs with an odd number are of another shape."""

    def __init__(self, num_pairs: int, *, num_shapes: int = 2, masked: bool = True) -> None:
        self.shapes, self.masked = SHAPES[:num_shapes], masked
        self.bucket_of = np.arange(num_pairs, dtype=np.int16) % num_shapes

    def latents(self, images: Any, flip: Any) -> torch.Tensor:
        shape = self.shapes[self.bucket_of[images[0][0]]]
        values = [pair + side / 10 + mirrored / 2 for (pair, side), mirrored in zip(images, flip, strict=True)]
        return torch.tensor(values)[:, None, None, None].expand(-1, *shape)

    def masks(self, images: Any, flip: Any) -> torch.Tensor | None:
        return 100 + self.latents(images, flip)[:, :1] if self.masked else None

    def conditioning(self, indices: Any, drop: Any) -> dict[str, torch.Tensor]:
        values = [-1.0 if dropped else pair for pair, dropped in zip(indices, drop, strict=True)]
        return {"text": torch.tensor(values)}

    def sizes(self, images: Any) -> torch.Tensor:
        return torch.tensor([[pair, side] for pair, side in images])


class KnownModel(SimpleNamespace):
    """Its timesteps are thousandths of the time, from `num_timesteps` where there is one."""

    device = torch.device("cpu")

    def sample_timesteps(self, uniform: torch.Tensor, num_timesteps: int | None) -> torch.Tensor:
        assert uniform.max() < 1
        return (uniform * (num_timesteps or 1_000_000)).long()

    def image_conditioning(self, sizes: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"time_ids": sizes}


def examples_of(num_pairs: int, num_images: int = 2) -> list[Example]:
    return [
        Example(
            f"key {pair}",
            tuple((pair, side) for side in range(num_images)),
            tuple(pair + side / 8 for side in range(num_images)),
            tuple(pair + side / 4 for side in range(num_images)),
            weight=1 + pair / 16,
        )
        for pair in range(num_pairs)
    ]


def reader_of(num_pairs: int = 16, *overrides: str, **parts: Any) -> Reader:
    cache = parts.pop("cache", None) or KnownCache(num_pairs, num_shapes=1)
    config: TrainConfig = make_config(Path("model"), Path("pairs"), Path("out"), *overrides)
    return Reader(config, KnownModel(), examples_of(num_pairs), cache, np.arange(num_pairs), **parts)  # type: ignore[arg-type]


@pytest.mark.parametrize("num_images", [1, 2, 3])
def test_all_that_belongs_to_an_example_stays_with_it(num_images: int):
    examples = [examples_of(16, num_images)[pair] for pair in (3, 9, 5)]
    visits = [Visit(pair, 0) for pair in (3, 9, 5)]
    random = draw_randomness(0, visits, ["a", "b", "c"], SHAPES[1], prompt_dropout=0.5, random_flip=True)
    assert 0 < random.flip.sum() < 3 and 0 < random.drop_prompt.sum() < 3
    times = torch.tensor([7, 8, 9])
    batch = gather(examples, random, times, KnownCache(16), KnownModel())  # type: ignore[arg-type]
    assert batch.latents.shape == (3, num_images, *SHAPES[1])
    assert batch.masks is not None and batch.masks.shape == (3, num_images, 1, *SHAPES[1][1:])
    assert batch.noise is random.noise and batch.timesteps is times
    for row, pair in enumerate((3, 9, 5)):
        assert batch.conditioning["text"][row] == (-1 if random.drop_prompt[row] else pair)
        assert batch.weights[row] == 1 + pair / 16
        for side in range(num_images):
            value = torch.tensor(pair + side / 10 + random.flip[row].item() / 2)
            assert (batch.latents[row, side] == value).all() and (batch.masks[row, side] == 100 + value).all()
            assert batch.labels[row, side] == pair + side / 8
            assert batch.scores is not None and batch.scores[row, side] == pair + side / 4
            assert batch.per_image["time_ids"][row, side].tolist() == [pair, side]
    assert batch.labels.dtype == batch.weights.dtype == torch.float32


def test_without_masks_and_scores_there_are_none():
    examples = [Example("a", ((1, 0), (1, 1)), (1, 0), weight=2)]  # whole numbers, which are no reason for integers
    random = draw_randomness(0, [Visit(1, 0)], ["a"], SHAPES[1], prompt_dropout=0, random_flip=False)
    batch = gather(examples, random, torch.tensor([7]), KnownCache(2, masked=False), KnownModel())  # type: ignore[arg-type]
    assert batch.masks is batch.scores is batch.reference is None
    assert batch.labels.dtype == batch.weights.dtype == torch.float32


def test_a_visit_is_drawn_by_the_runs_seed_and_its_examples_key():
    reader = reader_of(16, "seed=5", "prompt_dropout=0.4", "random_flip=true", "weighting.num_timesteps=4")
    visits = [Visit(index, 3) for index in (2, 7, 11, 4)]
    batch = reader.draw(visits)
    keys = ["key 2", "key 7", "key 11", "key 4"]
    expected = draw_randomness(5, visits, keys, SHAPES[0], prompt_dropout=0.4, random_flip=True)
    assert torch.equal(batch.noise, expected.noise)
    assert torch.equal(batch.timesteps, (4 * expected.timestep_uniform).long())
    assert torch.equal(batch.conditioning["text"] < 0, expected.drop_prompt)
    assert torch.equal(batch.latents[:, 0, 0, 0, 0] % 1 == 0.5, expected.flip)


def test_times_are_spread_over_the_range_and_stay_below_its_end():
    reader = reader_of(16, "weighting.timestep_range=[0.25, 0.75]")
    visits = [Visit(index, epoch) for epoch in range(20) for index in range(16)]
    times = reader.draw(visits).timesteps
    uniform = draw_randomness(
        0, visits, [f"key {v.index}" for v in visits], SHAPES[0], prompt_dropout=0, random_flip=False
    ).timestep_uniform
    assert (times - (250_000 + 500_000 * uniform.double())).abs().max() <= 1.1
    assert times.min() < 260_000 and times.max() > 740_000


def test_the_end_of_the_range_is_never_reached_by_rounding(monkeypatch: pytest.MonkeyPatch):
    reader = reader_of(16, "weighting.timestep_range=[0.5, 1]")
    monkeypatch.setattr(torch, "rand", lambda *size, generator: torch.full((3,), 1 - 2**-24))
    assert reader.draw([Visit(0, 0)]).timesteps.item() == 999_999  # 0.5 + 0.5 times that rounds to 1


def test_processes_and_micro_batches_divide_a_step_in_its_order():
    sizes = ["global_batch_size=12", "per_device_batch_size=2"]
    whole = reader_of(16, *sizes).visits(3)
    readers = [reader_of(16, *sizes, processes=Processes(rank, 3)) for rank in range(3)]
    assert [reader.num_micro_batches for reader in [reader_of(16, *sizes), *readers]] == [6, 2, 2, 2]
    shares = [reader.visits(3)[reader.places(number)] for number in range(2) for reader in readers]
    assert [visit for share in shares for visit in share] == list(whole)
    for reader in readers:
        for number in range(2):
            indices = [visit.index for visit in whole[reader.places(number)]]
            assert reader[3, number].weights.tolist() == [1 + index / 16 for index in indices]


def test_a_step_is_of_one_shape_and_an_example_of_its_first_images():
    first_pairs = np.array([5, 4, 3, 2, 1, 0])
    reader = reader_of(6, "global_batch_size=2", cache=KnownCache(6))
    reader = Reader(reader.config, reader.model, reader.examples, reader.cache, first_pairs)
    assert reader.group_of.tolist() == [1, 0, 1, 0, 1, 0]
    assert [group.tolist() for group in reader.schedule.groups] == [[1, 3, 5], [0, 2, 4]]
    shapes = {reader_of(6, "global_batch_size=2", cache=KnownCache(6))[step, 0].noise.shape[1:] for step in range(8)}
    assert shapes == set(SHAPES)


def test_only_a_curriculum_has_stages():
    settings = ["curriculum_stages=3", "curriculum_steps=2", "max_steps=9", "seed=11", "global_batch_size=6"]
    schedules = {order: reader_of(16, *settings, f"order={order}").schedule for order in ("shuffled", "curriculum")}
    assert {order: it.num_stages for order, it in schedules.items()} == {"shuffled": 1, "curriculum": 3}
    assert all((it.steps_per_stage, it.seed, it.global_batch_size) == (2, 11, 6) for it in schedules.values())


def test_where_the_references_errors_are_known_a_visit_takes_the_draw_that_they_are_of():
    class Known:
        def draw_of(self, visit: Visit) -> Visit:
            return Visit(visit.index, visit.epoch % 2)

        def of(self, draws: list[Visit]) -> np.ndarray:
            return np.array([[draw.index, draw.epoch] for draw in draws], np.float32)

    reader = reader_of(16, cached=Known())
    visits = [Visit(3, 5), Visit(2, 4)]
    batch = reader.read(visits)
    assert batch.reference is not None and batch.reference.tolist() == [[3, 1], [2, 0]]
    assert torch.equal(batch.noise, reader_of(16).draw([Visit(3, 1), Visit(2, 0)]).noise)
    assert reader_of(16).read(visits).reference is None


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_goes_from_a_step_to_the_last_and_tells_what_is_wrong(workers: int, monkeypatch: pytest.MonkeyPatch):
    settings = ["max_steps=5", "global_batch_size=4", "per_device_batch_size=2"]
    reader = reader_of(16, *settings, f"dataloader_num_workers={workers}")
    found = [batch.weights.tolist() for batch in reader.stream(3)]
    assert found == [reader[step, number].weights.tolist() for step in (3, 4) for number in (0, 1)]

    def damaged(cache: KnownCache, images: Any) -> torch.Tensor:
        raise ConfigError("the cache is damaged")

    monkeypatch.setattr(KnownCache, "sizes", damaged)
    with pytest.raises(ConfigError, match=r"^the cache is damaged$"):
        next(reader.stream(3))


def test_a_worker_leaves_it_to_its_parent_to_stop():
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = [signal.getsignal(number) for number in numbers]
    try:
        _leave_signals_to_the_parent(0)
        assert [signal.getsignal(number) for number in numbers] == [signal.SIG_IGN] * 3
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
