"""`train --find-beta`: every probe is a training from the same start, and the likeliest sound one is taken."""

import json
import signal
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from diffusion_dpo import find_beta, train
from diffusion_dpo.cli import main
from diffusion_dpo.config import ConfigError, load
from diffusion_dpo.data import PairSource, PreferencePair
from diffusion_dpo.find_beta import Probe, recommend
from diffusion_dpo.settings import TrainConfig
from tests.runs import make_config, read_metrics
from tests.shift_model import LoadedShift, ShiftDenoiser, ShiftPairs

NUM_STEPS = 6


class ManyPrompts(PairSource):
    """Shift pairs, clearly labelled, four to a prompt."""

    num_pairs: int = 400

    def read(self) -> Iterator[PreferencePair]:
        for number, pair in enumerate(ShiftPairs(num_pairs=self.num_pairs, side=2, slope=10.0).read()):
            assert isinstance(pair, PreferencePair)
            yield replace(pair, prompt=f"{pair.prompt} {number // 8}")


class ManyPromptsModel(ShiftDenoiser):
    """Reads the first word of a prompt."""

    side: int = 2

    def load(self, *, device: torch.device, dtype: torch.dtype, seed: int) -> LoadedShift:
        return _Loaded(self)


class _Loaded(LoadedShift):
    def encode_prompts(self, prompts: Sequence[str]) -> dict[str, torch.Tensor]:
        return super().encode_prompts([prompt.partition(" ")[0] for prompt in prompts])


@pytest.fixture(autouse=True)
def short_probes(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Two by two probes of a few steps each; signal handlers are left as they were."""
    monkeypatch.setattr(find_beta, "NUM_STEPS", NUM_STEPS)
    monkeypatch.setattr(find_beta, "_BETA_FACTORS", (0.2, 1.0))
    monkeypatch.setattr(find_beta, "_LEARNING_RATE_FACTORS", (1.0, 10.0))
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def arguments(folder: Path, *overrides: str) -> list[str]:
    return [
        "model.type=tests.test_find_beta:ManyPromptsModel",
        "data.type=tests.test_find_beta:ManyPrompts",
        "evaluation.share=0.5",
        "loss.beta=100",
        "learning_rate=0.02",
        "global_batch_size=32",
        "per_device_batch_size=16",
        "preview=null",
        f"cache_dir={folder / 'cache'}",
        f"output_dir={folder / 'run'}",
        *overrides,
    ]


def read_probes(folder: Path) -> list[Probe]:
    found = json.loads((folder / "run-find-beta" / "probes.json").read_text())
    assert found["num_steps"] == NUM_STEPS
    return [Probe(**row) for row in found["probes"]]


# --- the recommendation ----------------------------------------------------------------------------------------------


def probe(accuracy: float, loss: float | None, *, se: float | None = 0.05, chosen_error: float = 0.0) -> Probe:
    metrics = {"eval/accuracy": accuracy, "eval/loss": loss, "eval/accuracy/se": se, "eval/chosen_error": chosen_error}
    return Probe(1.0, 1.0, {name: value for name, value in metrics.items() if value is not None})


def test_the_lowest_held_out_loss_is_taken():
    likely, accurate, timid = probe(0.76, 0.60), probe(0.80, 0.95), probe(0.78, 0.69)
    for order in ([likely, accurate, timid], [timid, accurate, likely]):
        assert recommend(order) is likely


def test_without_a_loss_of_pairs_the_most_accurate_is_taken():
    best, other = probe(0.80, None), probe(0.76, None)
    assert recommend([best, other]) is recommend([other, best]) is best


@pytest.mark.parametrize("loss", [0.1, None])
def test_probes_that_broke_the_model_or_diverged_are_out_of_the_question(loss: float | None):
    broken, diverged = probe(0.99, loss, chosen_error=0.051), Probe(1.0, 9.0, {})
    good = probe(0.7, loss and 0.6)
    assert recommend([broken, diverged, good]) is good
    assert recommend([broken, diverged]) is None
    assert recommend([]) is None
    assert recommend([probe(0.9, loss, chosen_error=0.049)]) is not None


@pytest.mark.parametrize("loss", [0.6, None])
@pytest.mark.parametrize(
    "accuracy, se",
    [(0.6, 0.05), (0.5, 0.0), (0.3, 0.01), (1.0, None)],
    ids=["two standard errors", "all ties", "worse than chance", "one prompt"],
)
def test_nothing_is_recommended_that_could_be_chance(accuracy: float, se: float | None, loss: float | None):
    assert recommend([probe(accuracy, loss, se=se)]) is None


def test_what_is_better_than_chance_by_more_than_two_standard_errors_is_recommended():
    assert recommend([probe(0.61, 0.6, se=0.05)]) is not None


# --- a whole run -----------------------------------------------------------------------------------------------------


def test_the_command_probes_recommends_and_leaves_the_run_folder_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("diffusion_dpo.console._console.width", 80)
    assert main(["train", "--find-beta", *arguments(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "…" not in out  # the table is whole in a terminal of 80 columns
    assert {path.name for path in tmp_path.iterdir()} == {"cache", "run-find-beta"}
    probes = read_probes(tmp_path)
    settings = [(probe.beta, probe.learning_rate) for probe in probes]
    assert settings == [(pytest.approx(beta), pytest.approx(rate)) for beta in (20, 100) for rate in (0.02, 0.2)]
    best = recommend(probes)
    assert best is not None
    assert f"take: loss.beta={best.beta:g} learning_rate={best.learning_rate:g}, " in out
    [line] = [line for line in out.splitlines() if "<- take" in line]
    numbers = (f"{best.metrics['eval/loss']:.3f}", f"{best.metrics['eval/accuracy']:.2f}")
    assert line.split()[:4] == [f"{best.beta:g}", f"{best.learning_rate:g}", *numbers]
    assert best.metrics["eval/loss"] == min(probe.metrics["eval/loss"] for probe in probes if probe.is_sound)
    assert all(probe.metrics["eval/kl"] > 0 for probe in probes)
    assert probes[1].metrics["eval/kl"] > 20 * probes[0].metrics["eval/kl"]  # a ten times larger rate goes further
    assert main(["train", "--find-beta", *arguments(tmp_path)]) == 0
    assert read_probes(tmp_path) == probes


KINDS = {
    "dpo": [],
    "kto, whose baseline is a running mean": ["loss.type=kto", "loss.beta=100"],
    "ema reference": ["reference.type=ema", "loss.type=linear_dpo", "loss.beta=100", "reference.ema_decay=0.5"],
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_probe_is_what_train_would_have_done_with_its_settings(tmp_path: Path, kind: str):
    """So all start from the same weights with a fresh optimizer, and none leaves anything to the next."""
    find_beta.run(load(TrainConfig, None, arguments(tmp_path, *KINDS[kind])))
    for number, found in enumerate(read_probes(tmp_path)):
        overrides = [f"loss.beta={found.beta}", f"learning_rate={found.learning_rate}", f"max_steps={NUM_STEPS}"]
        overrides += [f"output_dir={tmp_path / str(number)}"]
        train.run(load(TrainConfig, None, arguments(tmp_path, *KINDS[kind], *overrides)))
        last = read_metrics(tmp_path / str(number))[-1]
        assert found.metrics == {name: value for name, value in last.items() if name.startswith("eval/")}


def test_a_real_model_begins_every_probe_with_the_same_weights(
    tiny_sd: Path, tiny_pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    first_steps, weights = [], []
    real = find_beta.train_step

    def recorded(run, step, batches):
        if step == 0:
            weights.append({name: value.detach().clone() for name, value in run.parameters.items()})
        metrics = real(run, step, batches)
        if step == 0:
            first_steps.append(metrics)
        return metrics

    monkeypatch.setattr(find_beta, "train_step", recorded)
    monkeypatch.setattr(find_beta, "NUM_STEPS", 2)
    config = make_config(tiny_sd, tiny_pairs, tmp_path / "run", "evaluation.share=0.3", "learning_rate=1e-2")
    find_beta.run(config)
    assert not (tmp_path / "run").exists()
    assert len(first_steps) == 4
    assert all(torch.equal(value, weights[0][name]) for later in weights for name, value in later.items())
    rates = [metrics.pop("learning_rate") for metrics in first_steps]
    assert rates == pytest.approx([1e-2, 1e-1] * 2)
    assert first_steps[0] == first_steps[1] and first_steps[2] == first_steps[3]
    same = {name for name in first_steps[0] if name.startswith(("errors/", "rewards/", "loss"))}
    assert {name: first_steps[0][name] for name in same} == {name: first_steps[2][name] for name in same}
    assert first_steps[2]["grad_norm"] == pytest.approx(5 * first_steps[0]["grad_norm"], rel=1e-3)  # beta is 5 times


def test_an_objective_without_beta_is_probed_for_its_learning_rate(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    overrides = [it for it in arguments(tmp_path, "loss.type=sft") if not it.startswith("loss.beta")]
    find_beta.run(load(TrainConfig, None, overrides))
    assert [(probe.beta, probe.learning_rate) for probe in read_probes(tmp_path)] == [(None, 0.02), (None, 0.2)]
    assert "loss.beta" not in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_probes_that_diverge_are_shown_as_such(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    """After the second step, which finds it, or after the last one, where only the evaluation does."""
    monkeypatch.setattr(find_beta, "_LEARNING_RATE_FACTORS", (1.0, 1e30))
    for num_steps in (3, 1):
        monkeypatch.setattr(find_beta, "NUM_STEPS", num_steps)
        folder = find_beta.run(load(TrainConfig, None, arguments(tmp_path)))
        probes = [Probe(**row) for row in json.loads((folder / "probes.json").read_text())["probes"]]
        assert [bool(probe.metrics) for probe in probes] == [True, False] * 2
        assert [probe.is_sound for probe in probes] == [True, False] * 2
        assert capsys.readouterr().out.count("diverged") == 2


def test_without_held_out_pairs_there_is_nothing_to_judge_by(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    settings = [text.replace("evaluation.share=0.5", "evaluation.share=0") for text in arguments(tmp_path)]
    assert main(["train", "--find-beta", *settings]) == 2
    assert "no pairs are held out to judge the probes by" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_contradictions_are_refused_before_anything_is_made(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"reference\.type=ema"):
        find_beta.run(load(TrainConfig, None, arguments(tmp_path, "loss.type=mapo", "reference.type=ema")))
    assert list(tmp_path.iterdir()) == []


def test_nothing_to_recommend_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    find_beta.run(load(TrainConfig, None, arguments(tmp_path, "learning_rate=1e-30")))
    out = capsys.readouterr().out
    assert "nothing to recommend" in out and "take:" not in out and "<- take" not in out


def test_the_working_directory_is_a_run_folder_like_any_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    folder = find_beta.run(load(TrainConfig, None, arguments(tmp_path, "output_dir=.")))
    assert folder == tmp_path / "here-find-beta"
    assert not any((tmp_path / "here").iterdir())
