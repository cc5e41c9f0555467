"""Order and randomness are functions of (seed, epoch, pair), of nothing else."""

import itertools
from collections import Counter

import numpy as np
import pytest
import torch

from diffusion_dpo.data.order import Schedule, Visit, draw_randomness

SHAPE = (4, 8, 8)
IDS = [f"pair-{i}" for i in range(10)]


def global_batch(seed: int, num_examples: int, size: int, step: int, *, num_stages: int = 1, steps_per_stage: int = 1):
    """The visits of one step of a schedule that has not been asked anything before."""
    everything = [np.arange(num_examples)]
    return Schedule(seed, everything, size, num_stages, steps_per_stage).visits(step)


def draw(visits: list[Visit], seed: int = 0, dropout: float = 0.3, flip: bool = True):
    return draw_randomness(
        seed, visits, [IDS[visit.index] for visit in visits], SHAPE, prompt_dropout=dropout, random_flip=flip
    )


def test_every_epoch_visits_every_pair_once_across_batch_borders():
    visits = [visit for step in range(15) for visit in global_batch(0, 10, 4, step)]
    assert Counter(visit.epoch for visit in visits) == {epoch: 10 for epoch in range(6)}
    for epoch in range(6):
        assert sorted(visit.index for visit in visits if visit.epoch == epoch) == list(range(10))


def test_order_changes_with_seed_and_epoch_and_not_otherwise():
    order = [visit.index for visit in global_batch(0, 10, 10, 0)]
    assert order == [visit.index for visit in global_batch(0, 10, 10, 0)]
    assert order != [visit.index for visit in global_batch(0, 10, 10, 1)]
    assert order != [visit.index for visit in global_batch(1, 10, 10, 0)]


def test_a_batch_larger_than_the_data_meets_a_pair_again_with_new_noise():
    visits = global_batch(0, 2, 4, 0)
    assert [visit.epoch for visit in visits] == [0, 0, 1, 1]
    noise = draw(visits).noise
    first, again = (next(i for i, v in enumerate(visits) if v == Visit(0, epoch)) for epoch in (0, 1))
    assert not torch.equal(noise[first], noise[again])


def test_randomness_of_a_visit_does_not_depend_on_its_batch():
    visits = [Visit(i, 0) for i in range(10)]
    whole = draw(visits)
    for start in range(0, 10, 3):
        part = draw(visits[start : start + 3])
        assert torch.equal(part.noise, whole.noise[start : start + 3])
        assert torch.equal(part.timestep_uniform, whole.timestep_uniform[start : start + 3])
        assert torch.equal(part.drop_prompt, whole.drop_prompt[start : start + 3])
        assert torch.equal(part.flip, whole.flip[start : start + 3])


def test_shares_are_what_was_asked_for():
    visits = [Visit(i % 10, i // 10) for i in range(4000)]
    random = draw(visits)
    assert abs(random.drop_prompt.float().mean() - 0.3) < 0.03
    assert abs(random.flip.float().mean() - 0.5) < 0.03
    assert abs(random.timestep_uniform.mean() - 0.5) < 0.02
    assert random.timestep_uniform.min() >= 0
    assert random.timestep_uniform.max() < 1
    assert abs(random.noise.std() - 1) < 0.01
    assert not draw(visits, flip=False).flip.any()


def test_the_draws_of_a_visit_know_nothing_of_each_other():
    """Or only the noisy steps would lose their prompt, or only mirrored images would be seen with little noise."""
    visits = [Visit(i % 10, i // 10) for i in range(4000)]
    random = draw(visits)
    columns = [
        random.timestep_uniform,
        random.drop_prompt,
        random.flip,
        random.noise[:, 0, 0, 0],
        random.noise[:, -1, -1, -1],
    ]
    correlations = np.corrcoef(np.stack([column.double().numpy() for column in columns]))
    assert np.abs(correlations - np.eye(5)).max() < 0.06  # 4 standard errors
    for chosen in (random.drop_prompt, ~random.drop_prompt, random.flip, ~random.flip):
        times = random.timestep_uniform[chosen]
        assert times.min() < 0.02 and times.max() > 0.98  # every noise level, not the middle ones alone


def test_a_share_of_0_is_nothing_and_half_is_half_at_the_very_edge(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch, "rand", lambda *size, generator: torch.tensor([0.5, 0.0, 0.5]))
    random = draw([Visit(0, 0)], dropout=0.0)
    assert not random.drop_prompt.any() and not random.flip.any()


def test_a_visit_draws_what_it_always_drew():
    """In every release: a run that was begun with one goes on with another."""
    random = draw([Visit(3, 2)], seed=7)
    assert random.timestep_uniform.item() == 0.8808320760726929
    assert (random.drop_prompt.item(), random.flip.item()) == (False, True)
    assert random.noise[0, :, 0, 0].tolist() == pytest.approx([0.842775, 1.084158, 1.273357, -0.125305], abs=1e-6)
    assert [visit.index for visit in global_batch(7, 10, 10, 2)] == [1, 5, 3, 4, 6, 9, 0, 8, 2, 7]


def test_an_epoch_is_shuffled_once_and_forgotten_after_the_next(monkeypatch: pytest.MonkeyPatch):
    real, shuffled = np.random.default_rng, list[list[int]]()
    monkeypatch.setattr(np.random, "default_rng", lambda key: (shuffled.append(key), real(key))[1])
    schedule = Schedule(3, [np.arange(10)], 4)
    for step in range(25):
        schedule.visits(step)
        assert len(schedule._orders[0]) <= 2
    assert shuffled == [[3, epoch] for epoch in range(10)]


# --- the curriculum --------------------------------------------------------------------------------------------------


def curriculum(num_steps: int, *, num_examples: int = 23, size: int = 4, stages: int = 3, steps: int = 7):
    """The visits of every step, in a curriculum of `stages` stages of `steps` steps."""
    return [
        global_batch(0, num_examples, size, step, num_stages=stages, steps_per_stage=steps)
        for step in range(num_steps)
    ]


def test_stage_k_of_n_draws_from_the_first_k_nths_only_and_from_all_of_them():
    batches = curriculum(120)
    for stage, pool in enumerate((8, 16, 23)):  # thirds of 23, rounded up
        seen = {visit.index for batch in batches[7 * stage : 7 * (stage + 1)] for visit in batch}
        assert seen == set(range(pool))
    assert all(len(batch) == 4 for batch in batches)
    assert {visit.index for batch in batches[100:] for visit in batch} == set(range(23))


def test_every_epoch_of_a_curriculum_is_complete_but_for_those_that_a_stage_cuts_short():
    visits = [visit for batch in curriculum(14 + 46) for visit in batch]
    epochs = {epoch: [v.index for v in visits if v.epoch == epoch] for epoch in sorted({v.epoch for v in visits})}
    # 28 visits of 8 examples, 28 of 16, then 46 * 4 of 23: eight whole epochs
    assert [len(indices) for indices in epochs.values()] == [8, 8, 8, 4, 16, 12, *[23] * 8]
    assert all(len(set(indices)) == len(indices) for indices in epochs.values())
    assert [visit.epoch for visit in visits] == sorted(visit.epoch for visit in visits)


def test_no_stage_repeats_the_noise_of_another():
    """Noise is keyed by (seed, epoch, example): a visit that came back would bring its noise along."""
    for settings in ({}, {"num_examples": 5, "stages": 5}, {"num_examples": 1}, {"size": 50, "steps": 1}):
        visits = [visit for batch in curriculum(60, **settings) for visit in batch]
        assert len(set(visits)) == len(visits)
        assert {visit.epoch for visit in visits} == set(range(max(visit.epoch for visit in visits) + 1))


def test_one_stage_is_no_curriculum():
    assert curriculum(30, stages=1) == [global_batch(0, 23, 4, step) for step in range(30)]


# --- groups of one shape ---------------------------------------------------------------------------------------------

GROUPS = [np.array([0, 3, 6, 9, 12, 15]), np.array([1, 4]), np.array([2, 5, 7, 8, 10, 11, 13, 14, 16, 17, 18, 19])]


@pytest.mark.parametrize("sizes", [(6, 2, 12), (5, 5), (1, 30), (7, 11, 3, 2)])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_kth_turn_of_a_group_is_at_k_plus_its_phase_over_its_share(seed: int, sizes: tuple[int, ...]):
    phases = np.random.default_rng([seed, len(sizes)]).random(len(sizes))
    times = [
        ((k + phase) * sum(sizes) / size, group, k)
        for group, (size, phase) in enumerate(zip(sizes, phases, strict=True))
        for k in range(400)
    ]
    borders = np.cumsum([0, *sizes])
    groups = [np.arange(start, end) for start, end in itertools.pairwise(borders)]
    schedule = Schedule(seed, groups, 1)
    for step, (_, group, turn) in enumerate(sorted(times)[:140]):
        (visit,) = schedule.visits(step)
        assert borders[group] <= visit.index < borders[group + 1]
        assert visit.epoch == turn // sizes[group]


def test_a_step_stays_within_a_group_and_no_step_depends_on_what_was_asked_before():
    schedule = Schedule(0, GROUPS, 4)
    steps = [schedule.visits(step) for step in range(200)]
    for visits in steps:
        assert any({visit.index for visit in visits} <= set(group.tolist()) for group in GROUPS)
    for step in (199, 0, 57):
        assert Schedule(0, GROUPS, 4).visits(step) == steps[step]
    assert [Schedule(1, GROUPS, 4).visits(step) for step in range(200)] != steps


@pytest.mark.parametrize("seed", range(5))
def test_every_example_is_met_as_often_as_any_other_and_never_with_the_same_noise(seed: int):
    visits = [visit for step in range(200) for visit in Schedule(seed, GROUPS, 4).visits(step)]
    assert len(set(visits)) == len(visits)
    counts = Counter(visit.index for visit in visits)
    assert set(counts) == set(range(20))
    for group in GROUPS:
        within = [counts[index] for index in group.tolist()]
        assert max(within) - min(within) <= 1
        assert abs(sum(within) - 800 * len(group) / 20) <= 4 * len(GROUPS)  # a step or two from its share


def test_groups_take_turns_evenly_not_one_after_the_other():
    schedule = Schedule(0, GROUPS, 4)
    for start in range(0, 200, 20):
        indices = {visit.index for step in range(start, start + 20) for visit in schedule.visits(step)}
        assert all(indices & set(group.tolist()) for group in GROUPS)
