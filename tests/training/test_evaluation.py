"""Held-out pairs: always the same cells, honest errors, and a KL divergence that is known for the shift model."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from diffusion_dpo import train
from diffusion_dpo.config import load
from diffusion_dpo.data import PairSource, PreferencePair
from diffusion_dpo.data.collect import collect
from diffusion_dpo.data.shards import PAIRS, read_rows, write_shard
from diffusion_dpo.models import DiffusionModel, LoadedModel
from diffusion_dpo.processes import Processes
from diffusion_dpo.settings import TrainConfig
from diffusion_dpo.training import Run
from diffusion_dpo.training.errors import denoising_errors
from diffusion_dpo.training.evaluation import HeldOut, progress_note
from diffusion_dpo.training.setup import prepare
from tests.runs import make_config, read_metrics
from tests.shift_model import PROMPTS, LoadedShift, ShiftDenoiser, ShiftPairs

SIDE = 8
UNEQUAL = [0, 0, 0, 0, 1, 1, 2, 3, 4, 5]
"""A prompt with four pairs, one with two, and four with one."""


class NumberedPrompts(PairSource):
    """Shift pairs under several prompts: the n-th pair under `prompt_of[n % len]` of them."""

    num_pairs: int = 40
    prompt_of: list[int] = UNEQUAL

    def read(self) -> Iterator[PreferencePair]:
        for number, pair in enumerate(ShiftPairs(num_pairs=self.num_pairs, side=SIDE).read()):
            prompt = self.prompt_of[number % len(self.prompt_of)]
            assert isinstance(pair, PreferencePair)
            yield replace(pair, prompt=f"{pair.prompt} {prompt} {number // len(self.prompt_of)}")


class ShiftOfNumberedPrompts(LoadedShift):
    """Its sign is that of a prompt's first word."""

    def encode_prompts(self, prompts: Sequence[str]) -> dict[str, torch.Tensor]:
        return super().encode_prompts([prompt.partition(" ")[0] for prompt in prompts])


def prepared(folder: Path, *overrides: str, source: PairSource | None = None, prediction: str = "epsilon") -> Run:
    """A run on the shift model that is ready for its first step; half of the pairs are held out."""
    settings = [
        "model.type=tests.shift_model:ShiftDenoiser",
        "data.type=tests.shift_model:ShiftPairs",
        "evaluation.share=0.5",
        "global_batch_size=8",
        "per_device_batch_size=8",
        f"output_dir={folder}",
        *overrides,
    ]
    model = ShiftOfNumberedPrompts(ShiftDenoiser(side=SIDE, prediction=prediction))
    data = collect(source or NumberedPrompts(), max_broken_share=0)
    return prepare(load(TrainConfig, None, settings), model, data, torch.float32)


def held_out(run: Run) -> HeldOut:
    assert run.held_out is not None
    return run.held_out


def shift(run: Run, size: float = 0.5, *, seed: int | None = None) -> None:
    """Shift the policy towards the reward, or where the seed says, by a vector of the given length."""
    parameter = run.parameters["shift"]
    direction = torch.ones(parameter.shape)
    if seed is not None:
        direction = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        parameter.copy_(size * direction / direction.norm())


def evaluate(run: Run) -> dict[str, float]:
    return held_out(run).evaluate(run.model)


# --- always the same -------------------------------------------------------------------------------------------------


def test_unchanged_weights_give_the_same_numbers_and_nobody_elses_randomness_is_used(tmp_path: Path):
    run = prepared(tmp_path)
    shift(run, seed=1)
    before = torch.get_rng_state()
    first = evaluate(run)
    assert evaluate(run) == first
    torch.manual_seed(7)
    shift(run, seed=2)
    assert evaluate(run) != first
    shift(run, seed=1)
    assert evaluate(run) == first
    torch.set_rng_state(before)
    evaluate(run)
    assert torch.equal(torch.get_rng_state(), before)
    assert not run.parameters["shift"].grad


@pytest.mark.parametrize("size", [1, 3, 24, 1000])
def test_the_batch_size_changes_nothing_at_all(tmp_path: Path, size: int):
    """Nor do other things of training: its order, dropout, range of timesteps, steps."""
    others = [f"per_device_batch_size={size}", f"global_batch_size={size}", "max_steps=3", "prompt_dropout=0.9"]
    others += ["weighting.timestep_range=[0.2,0.4]", "random_flip=true"]
    runs = [prepared(tmp_path / "a"), prepared(tmp_path / "b", *others)]
    for run in runs:
        shift(run, seed=1)
    first, second = map(evaluate, runs)
    for name in ("eval/loss", "eval/loss/se"):  # sigmoids end in other bits where vector instructions do
        assert second.pop(name) == pytest.approx(first.pop(name), rel=1e-6)
    assert first == second


def test_the_seed_changes_the_grids_noise(tmp_path: Path):
    found = []
    for seed in (0, 1):
        run = prepared(tmp_path / str(seed))
        shift(run, seed=1)
        found.append(replace(held_out(run), seed=seed).evaluate(run.model)["eval/margin"])
    assert found[0] != found[1]


def test_neither_workers_nor_evaluating_more_often_change_the_run(tmp_path: Path):
    runs = {"plain": ["evaluation.every_steps=2"], "workers": ["evaluation.every_steps=2", "dataloader_num_workers=2"]}
    runs["often"] = ["evaluation.every_steps=1"]
    rows = {}
    for name, overrides in runs.items():
        settings = ["model.type=tests.shift_model:ShiftDenoiser", "data.type=tests.shift_model:ShiftPairs"]
        settings += ["data.num_pairs=64", "max_steps=4", "global_batch_size=4", "preview=null", "learning_rate=1e-2"]
        settings += ["evaluation.share=0.5", f"output_dir={tmp_path / name}", f"cache_dir={tmp_path / 'cache'}"]
        train.run(load(TrainConfig, None, [*settings, *overrides]))
        rows[name] = read_metrics(tmp_path / name)
    assert rows["workers"] == rows["plain"]
    assert ["eval/kl" in row for row in rows["plain"]] == [False, True, False, True]
    assert all("eval/kl" in row for row in rows["often"])
    for often, plain in zip(rows["often"], rows["plain"], strict=True):
        assert plain.items() <= often.items()


def test_the_references_predictions_are_computed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    calls = []
    real = LoadedShift.predict

    def counted(self: LoadedShift, noisy_latents: torch.Tensor, *args) -> torch.Tensor:
        calls.append(("reference" if self._is_reference else "policy", len(noisy_latents)))
        return real(self, noisy_latents, *args)

    monkeypatch.setattr(LoadedShift, "predict", counted)
    run = prepared(tmp_path, "per_device_batch_size=4")
    cells = len(held_out(run).examples) * 8
    for _ in range(3):
        shift(run, seed=len(calls))
        evaluate(run)
    assert calls.count(("reference", 8)) == cells // 4  # of four pairs
    assert calls.count(("policy", 8)) == 3 * cells // 4
    assert len(calls) == cells
    monkeypatch.undo()
    fresh = replace(held_out(run), _reference={})
    assert fresh.evaluate(run.model) == evaluate(run)


# --- what the numbers mean -------------------------------------------------------------------------------------------


def assert_policy_is_reference(metrics: dict[str, float]) -> None:
    for name, value in metrics.items():
        expected = 0.5 if name.endswith("accuracy") else math.log(2) if name == "eval/loss" else 0
        assert value == pytest.approx(expected, abs=1e-6 if name.startswith("eval/loss") else 0), name


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_before_training_all_is_a_tie(tmp_path: Path, prediction: str):
    metrics = evaluate(prepared(tmp_path, prediction=prediction))
    assert_policy_is_reference(metrics)
    assert {"eval/accuracy/se", "eval/margin", "eval/chosen_error", "eval/rejected_error", "eval/kl"} <= metrics.keys()
    assert progress_note(metrics) == "accuracy 0.50, chosen error +0.00%, rejected +0.00%, KL 0 nats"


def test_before_training_a_real_model_ties_as_well_and_after_it_does_not(
    any_sd: Path, tiny_pairs: Path, tmp_path: Path
):
    config = make_config(any_sd, tiny_pairs, tmp_path, "evaluation.share=0.3", "learning_rate=1e-2", "preview=null")
    model: LoadedModel = config.model.load(device=torch.device("cpu"), dtype=torch.float32, seed=0)  # type: ignore
    assert isinstance(config.model, DiffusionModel)
    run = prepare(config, model, collect(config.data, max_broken_share=0), torch.float32)  # type: ignore[arg-type]
    assert len(held_out(run).examples) == 3
    assert_policy_is_reference(evaluate(run))
    batches = run.reader.stream(0)
    for step in range(2):
        train.train_step(run, step, batches)
    batches.close()
    first = evaluate(run)
    assert evaluate(run) == first
    assert first["eval/kl"] > 0 and first["eval/margin"] != 0
    large = replace(held_out(run), batch_size=24, _reference={}).evaluate(model)
    for name, value in first.items():
        assert large[name] == pytest.approx(value, rel=1e-2, abs=1e-6), name


@pytest.mark.parametrize("count", [2, 3, 7])
def test_processes_measure_every_cell_once_between_them(tmp_path: Path, count: int):
    run = prepared(tmp_path, "loss.beta=100")
    shift(run, seed=1)
    tables: list[torch.Tensor] = []

    class Rank(Processes):
        def sum(self, tensor: torch.Tensor) -> torch.Tensor:
            tables.append(tensor.clone())
            return tensor

    held = replace(held_out(run), batch_size=24, _reference={})
    held.evaluate(run.model, Rank())
    predicted = []
    for rank in range(count):
        share = replace(held, _reference={})
        share.evaluate(run.model, Rank(rank, count))
        predicted.append(len(share._reference))
    torch.testing.assert_close(sum(tables[1:]), tables[0])
    written = [table[:3].ne(0).any(0).any(1) for table in tables]
    assert written[0].all() and sum(mask.int() for mask in written[1:]).eq(1).all()
    assert set(predicted) <= {len(held._parts) // count, -(-len(held._parts) // count)}


def test_errors_are_those_of_every_pair_at_the_middles_of_the_schedule(tmp_path: Path):
    run = prepared(tmp_path)
    shift(run, 1.0, seed=3)
    held, metrics = held_out(run), evaluate(run)
    whole = replace(held, batch_size=10**6)
    batch = whole._batch(run.model, whole._parts[0])
    assert batch.timesteps.view(-1, 8).eq(torch.arange(62, 1000, 125)).all()
    assert len(torch.unique(batch.noise.flatten(1), dim=0)) == len(batch.noise) == 8 * len(held.examples)
    errors = denoising_errors(run.model, batch, reference=run.model.reference)
    assert errors.reference is not None
    policy, reference = errors.policy.detach().double(), errors.reference.double()
    gain = reference - policy
    margin = gain[:, 0] - gain[:, 1]
    assert metrics["eval/margin"] == pytest.approx(margin.mean().item(), rel=1e-6)
    assert metrics["eval/accuracy"] == pytest.approx((margin > 0).double().mean().item())
    for column, name in enumerate(("chosen_error", "rejected_error")):
        ratio = policy[:, column].mean() / reference[:, column].mean() - 1
        assert metrics[f"eval/{name}"] == pytest.approx(ratio.item(), rel=1e-6)


def test_the_loss_is_the_objectives_where_that_is_about_pairs(tmp_path: Path):
    for loss in ("dpo", "ipo"):
        run = prepared(tmp_path / loss, f"loss.type={loss}", "loss.beta=100", "weighting.timesteps=min_snr")
        shift(run, 1.0, seed=3)
        whole = replace(held_out(run), batch_size=10**6)
        batch = whole._batch(run.model, whole._parts[0])
        values = run.objective(denoising_errors(run.model, batch, reference=run.model.reference))[1].loss
        metrics = evaluate(run)
        assert metrics["eval/loss"] == pytest.approx(values.mean().item(), rel=1e-5)
        assert metrics["eval/loss/se"] > 0
    run = prepared(tmp_path / "kto", "loss.type=kto")
    assert "eval/loss" not in evaluate(run)


def test_a_shift_towards_the_reward_is_seen_as_such_and_swapped_labels_see_the_opposite(tmp_path: Path):
    source = ShiftPairs(num_pairs=200, side=SIDE, slope=10.0)
    run, swapped = (
        prepared(tmp_path, f"swap_labels={value}", "evaluation.max_pairs=200", source=source)
        for value in ("false", "true")
    )
    shift(run)
    right = evaluate(run)
    shift(run, -0.5)
    wrong = evaluate(run)
    assert right["eval/accuracy"] > 0.95 and right["eval/margin"] > 0
    assert wrong["eval/accuracy"] < 0.05 and wrong["eval/margin"] < 0
    shift(swapped)
    opposite = evaluate(swapped)
    assert opposite["eval/accuracy"] == pytest.approx(1 - right["eval/accuracy"])
    assert opposite["eval/margin"] == pytest.approx(-right["eval/margin"])
    assert opposite["eval/chosen_error"] == right["eval/rejected_error"]
    assert opposite["eval/kl"] == pytest.approx(right["eval/kl"])


def test_the_noise_levels_average_to_the_total(tmp_path: Path):
    run = prepared(tmp_path)
    shift(run, seed=1)
    metrics = evaluate(run)
    levels = {name.split("/")[1] for name in metrics if "log_snr" in name}
    alphas = run.model.scheduler.alphas_cumprod.double()  # type: ignore[attr-defined]
    log_snr = (alphas / (1 - alphas)).log()[62::125]
    assert levels == {f"log_snr_{value:+.2f}" for value in log_snr.tolist()}
    assert len(levels) == 8
    for what in ("accuracy", "margin"):
        assert np.mean([metrics[f"eval/{level}/{what}"] for level in levels]) == pytest.approx(metrics[f"eval/{what}"])
    # relative errors are over the level's own error, which weighs them in the total
    whole = replace(held_out(run), batch_size=10**6)
    batch = whole._batch(run.model, whole._parts[0])
    found = denoising_errors(run.model, batch, reference=run.model.reference).reference
    assert found is not None
    weights = found[:, 0].view(-1, 8).mean(0)
    levels_in_order = [f"log_snr_{value:+.2f}" for value in log_snr.tolist()]
    parts = [metrics[f"eval/{level}/chosen_error"] for level in levels_in_order]
    assert np.average(parts, weights=weights) == pytest.approx(metrics["eval/chosen_error"], rel=1e-5)


def one_by_one(run: Run, what: str) -> dict[str, list[float]]:
    """A metric of every held-out pair by itself, by prompt."""
    found: dict[str, list[float]] = {}
    held = held_out(run)
    for example, prompt in zip(held.examples, held.prompts, strict=True):
        alone = replace(held, examples=[example], prompts=[prompt], _reference={})
        metrics = alone.evaluate(run.model)
        assert not any(name.endswith("/se") for name in metrics)  # there is none of a single prompt
        found.setdefault(prompt, []).append(metrics[f"eval/{what}"])
    return found


@pytest.mark.parametrize("what", ["margin", "accuracy"])
def test_standard_errors_take_prompts_for_what_was_sampled(tmp_path: Path, what: str):
    """The ratio estimator of a cluster sample, of unequal clusters, written out."""
    run = prepared(tmp_path)
    shift(run, seed=1)
    metrics, clusters = evaluate(run), one_by_one(run, what)
    assert len({len(values) for values in clusters.values()}) > 1
    mean = sum(map(sum, clusters.values())) / sum(map(len, clusters.values()))
    assert metrics[f"eval/{what}"] == pytest.approx(mean)
    residuals = [sum(values) - len(values) * mean for values in clusters.values()]
    mean_size = sum(map(len, clusters.values())) / len(clusters)
    variance = sum(residual**2 for residual in residuals) / (len(clusters) - 1) / len(clusters) / mean_size**2
    assert metrics[f"eval/{what}/se"] == pytest.approx(math.sqrt(variance), rel=1e-5)


@pytest.mark.parametrize("prompt_of", [list(range(10)), [0, 0, 1, 1, 2, 2]])
def test_of_equal_prompts_the_standard_error_is_that_of_their_means(tmp_path: Path, prompt_of: list[int]):
    run = prepared(tmp_path, source=NumberedPrompts(num_pairs=30, prompt_of=prompt_of))
    shift(run, seed=1)
    metrics, clusters = evaluate(run), one_by_one(run, "margin")
    means = [np.mean(values) for values in clusters.values()]
    assert len(means) > 5
    assert metrics["eval/margin/se"] == pytest.approx(np.std(means, ddof=1) / math.sqrt(len(means)), rel=1e-5)


# --- the KL divergence -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_the_kl_divergence_is_that_of_the_two_gaussians(tmp_path: Path, prediction: str):
    """KL(N(delta, I) || N(0, I)) = |delta|^2 / 2.

    The bound's weights are summed from the schedule's cleanest to its noisiest level, where alpha^2 falls from 0.9991
    to 0.0047: what lies beyond is missing, and the sum is 0.994 of the whole. With 500 timesteps the rest is rounding.
    """
    run = prepared(tmp_path, "evaluation.num_timesteps=500", "evaluation.max_pairs=4", prediction=prediction)
    alphas = run.model.scheduler.alphas_cumprod  # type: ignore[attr-defined]
    within_schedule = (alphas[0] - alphas[-1]).item()
    assert within_schedule == pytest.approx(0.9945, abs=1e-4)
    for size in (0.1, 3.0):
        shift(run, size, seed=5)
        kl = evaluate(run)["eval/kl"]
        assert kl == pytest.approx(size**2 / 2, rel=0.01)
        assert kl == pytest.approx(within_schedule * size**2 / 2, rel=1e-3)


@pytest.mark.parametrize(("num_timesteps", "ratio"), [(8, 1.17), (16, 1.06)])
def test_the_default_grid_is_coarse_and_errs_on_the_safe_side(tmp_path: Path, num_timesteps: int, ratio: float):
    """The default eight timesteps overestimate the divergence of a shift by a sixth: no budget is exceeded unseen."""
    run = prepared(tmp_path, f"evaluation.num_timesteps={num_timesteps}")
    shift(run, 1.0)
    assert evaluate(run)["eval/kl"] == pytest.approx(ratio / 2, rel=0.01)


def test_the_kl_divergence_does_not_depend_on_where_the_model_predicts(tmp_path: Path):
    found = []
    for prediction in ("epsilon", "v_prediction", "sample"):
        run = prepared(tmp_path / prediction, prediction=prediction)
        shift(run, seed=5)
        found.append(evaluate(run)["eval/kl"])
    assert found == pytest.approx([found[0]] * 3, rel=1e-5)


class StartedShift(ShiftOfNumberedPrompts):
    """Its training started from a shift, which is its reference; without it, it is N(0, I)."""

    start: torch.Tensor
    without_start = False

    def predict(self, *inputs: Any) -> torch.Tensor:
        kept, is_reference = self.shift.data, self._is_reference
        if self.without_start or is_reference:
            self.shift.data = torch.zeros_like(kept) if self.without_start else self.start
        self._is_reference = False
        try:
            return super().predict(*inputs)
        finally:
            self.shift.data, self._is_reference = kept, is_reference

    @contextmanager
    def original(self) -> Iterator[None]:
        self.without_start = True
        with torch.no_grad():
            yield
        self.without_start = False


def test_where_training_started_elsewhere_the_divergence_is_also_from_the_base(tmp_path: Path):
    """|delta - start|^2 / 2 and |delta|^2 / 2, of which the default grid makes 1.17 times as much."""
    run = prepared(tmp_path)
    model = StartedShift(ShiftDenoiser(side=SIDE))
    assert isinstance(run.model, LoadedShift)
    model.shift, model.start = run.model.shift, torch.full_like(run.model.shift.data, 0.3 / SIDE)
    shift(run, 1.2)
    metrics = replace(held_out(run), _reference={}, _original={}).evaluate(model)
    assert metrics["eval/kl"] == pytest.approx(1.17 * 0.9**2 / 2, rel=0.01)
    assert metrics["eval/kl_base"] == pytest.approx(1.17 * 1.2**2 / 2, rel=0.01)
    assert progress_note(metrics).endswith("KL 0.47 nats, 0.84 from the base")
    assert "eval/kl_base" not in evaluate(run)


def test_a_model_of_few_timesteps_is_asked_at_those(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    asked = []

    def noted(self: LoadedShift, uniform: torch.Tensor, num_timesteps: int | None = None) -> torch.Tensor:
        asked.append(([round(it, 6) for it in uniform.tolist()], num_timesteps))
        return (uniform * 1000).long()

    run = prepared(tmp_path)
    monkeypatch.setattr(LoadedShift, "sample_timesteps", noted)
    replace(held_out(run), num_timesteps=4, _reference={}, only_trained=True).evaluate(run.model)
    middles, edges = ([0.125, 0.375, 0.625, 0.875], 4), ([0.0, 0.25, 0.5, 0.75, 0.999999], None)
    assert asked.count(edges) == 1 and asked.count(middles) == len(asked) - 1 > 1


def test_batches_are_of_one_shape_each(tmp_path: Path):
    run = prepared(tmp_path)
    held = replace(held_out(run), num_timesteps=2, batch_size=3)
    held.examples = held.examples[:5]
    wide = [pair for example in held.examples[2:4] for pair, _ in example.images]
    buckets = np.isin(np.arange(len(held.cache.bucket_of)), wide).astype(int)
    held.cache = SimpleNamespace(shapes=[(1, 8, 8), (1, 4, 16)], bucket_of=buckets)  # type: ignore[assignment]
    assert held._shapes == [(1, 8, 8)] * 2 + [(1, 4, 16)] * 2 + [(1, 8, 8)]
    assert held._parts == [range(3), range(3, 4), range(4, 7), range(7, 8), range(8, 10)]
    # nats are of an image: the drift of each of its numbers, times how many it has
    drift = torch.rand(5, 2, 2).numpy()
    held.__dict__["_shapes"] = [(1, 8, 8)] * 2 + [(1, 4, 4)] * 3
    sizes = np.array([64, 64, 16, 16, 16])[:, None, None]
    alike = replace(held)
    alike.__dict__["_shapes"] = [(1, 1, 1)] * 5
    assert held._kl(run.model, drift) == pytest.approx(alike._kl(run.model, drift * sizes))


# --- held out means held out -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", ["dpo", "kto", "sft"])
def test_held_out_pairs_never_appear_in_a_training_batch(tmp_path: Path, loss: str):
    run = prepared(tmp_path, f"loss.type={loss}", "prompt_dropout=0")
    held = held_out(run)

    def content(latents: torch.Tensor) -> set[bytes]:
        return {image.numpy().tobytes() for image in latents.flatten(0, -4)}

    images = [image for example in held.examples for image in example.images]
    unseen = content(held.cache.latents(images, [False] * len(images)))
    seen: set[bytes] = set()
    for step in range(20):
        seen |= content(run.reader[step, 0].latents)
    assert not seen & unseen
    assert len(unseen) == 40
    assert len(seen) == (20 if loss == "sft" else 40)  # all that is left, of which sft sees the chosen half
    prompts = [record.prompt for record in collect(NumberedPrompts(), max_broken_share=0).records]
    assert len(prompts) == 40
    trained_on = {prompts[index] for example in run.reader.examples for index, _ in example.images}
    assert trained_on | set(held.prompts) == set(prompts)
    assert not trained_on & set(held.prompts)
    assert set(PROMPTS) == {prompt.partition(" ")[0] for prompt in held.prompts}


def test_held_out_prompts_that_the_model_cannot_tell_apart_are_said(
    tiny_sd: Path, tiny_pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = list(read_rows(tiny_pairs))
    for number, row in enumerate(rows):
        row["prompt"] = f"a circle of many colours {'abc'[number % 3]}"
    (tmp_path / "pairs").mkdir()
    write_shard(tmp_path / "pairs" / "pairs-00000.parquet", rows, PAIRS)
    common = [f"model.pretrained={tiny_sd}", f"data.path={tmp_path / 'pairs'}", "preview=null", "max_steps=1"]
    train.run(load(TrainConfig, None, [*common, "evaluation.share=0.4", f"output_dir={tmp_path / 'run'}"]))
    out = capsys.readouterr().out
    assert "3 of 3 prompts are cut" in out
    assert "(pairs-00000.parquet row 0)" in out
    assert "1 held-out prompts become the same as prompts that are trained on" in out
