"""The reference, three ways: adapters switched off, a frozen copy, errors computed beforehand; the same losses."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from diffusion_dpo import train
from diffusion_dpo.config import ConfigError
from diffusion_dpo.models.stable_diffusion import LoadedStableDiffusion
from tests.runs import MODES, final_state, make_config, read_metrics

PLAIN = ["preview=null", "learning_rate=1e-2", "evaluation.share=0.3", "evaluation.every_steps=3"]
DRAWN_ONCE = ["random_flip=true", "prompt_dropout=0.3"]
TRACE = ("loss", "grad_norm", "errors/chosen", "errors/reference_chosen", "errors/reference_rejected", "eval/kl")


def trained(model: Path, pairs: Path, folder: Path, *overrides: str) -> list[dict[str, float]]:
    train.run(make_config(model, pairs, folder, *PLAIN, *DRAWN_ONCE, *overrides))
    return read_metrics(folder)


def assert_same_trace(one: list[dict[str, float]], other: list[dict[str, float]], rel: float) -> None:
    assert len(one) == len(other) == 6
    for step, (a, b) in enumerate(zip(one, other, strict=True)):
        for name in TRACE:
            assert (name in a) == (name in b), (step, name)
            assert a.get(name, 0.0) == pytest.approx(b.get(name, 0.0), rel=rel, abs=1e-9), (step, name)


@pytest.mark.parametrize("mode", MODES)
def test_three_references_give_the_same_losses(tiny_sd: Path, tiny_pairs: Path, tmp_path: Path, mode: str):
    """With as many draws as there are epochs: 24 visits of 7 pairs. A copy is even the same bit for bit."""
    fresh = trained(tiny_sd, tiny_pairs, tmp_path / "auto", *MODES[mode])
    copied = trained(tiny_sd, tiny_pairs, tmp_path / "copy", *MODES[mode], "reference.type=frozen_copy")
    cached = ["reference.type=cached", "reference.num_draws=4"]
    cached = trained(tiny_sd, tiny_pairs, tmp_path / "cached", *MODES[mode], *cached)
    assert copied == fresh
    assert_same_trace(cached, fresh, rel=1e-5)
    assert "errors/drift" in fresh[0] and "errors/drift" not in cached[0]


def test_with_fewer_draws_than_epochs_they_come_again(tiny_sd: Path, tiny_pairs: Path, tmp_path: Path):
    """All 8 pairs in every batch: with two draws, the reference's mean errors have a period of two steps."""
    sizes = ["global_batch_size=8", "per_device_batch_size=8", "evaluation.share=0.2"]
    rows = trained(tiny_sd, tiny_pairs, tmp_path, *sizes, "reference.type=cached", "reference.num_draws=2")
    errors = [row["errors/reference_chosen"] for row in rows]
    assert errors[0] == pytest.approx(errors[2], rel=1e-5) == pytest.approx(errors[4], rel=1e-5)
    assert errors[1] == pytest.approx(errors[5], rel=1e-5) != pytest.approx(errors[0], rel=1e-3)
    assert rows[0]["errors/chosen"] != rows[2]["errors/chosen"]


def test_once_computed_nobody_asks_the_reference_and_no_copy_is_held(
    tiny_sd: Path, tiny_pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    settings = ["model.lora=null", "reference.type=cached", "evaluation.share=0", f"cache_dir={tmp_path / 'cache'}"]
    first = trained(tiny_sd, tiny_pairs, tmp_path / "first", *settings)

    def refuse(self: LoadedStableDiffusion) -> None:
        raise AssertionError("the reference was asked, or copied")

    monkeypatch.setattr(LoadedStableDiffusion, "reference", refuse)
    monkeypatch.setattr(LoadedStableDiffusion, "freeze_copy", refuse)
    assert trained(tiny_sd, tiny_pairs, tmp_path / "second", *settings) == first


def test_only_draws_that_a_step_will_meet_are_computed(tiny_sd: Path, tiny_pairs: Path, tmp_path: Path):
    """Three visits of ten pairs: three draws; more steps add to them; another number of draws uses what is there."""
    cached = [
        "reference.type=cached",
        "reference.num_draws=2",
        "evaluation.share=0",
        f"cache_dir={tmp_path / 'cache'}",
    ]
    found = []
    for steps in (1, 6):
        config = make_config(tiny_sd, tiny_pairs, tmp_path / str(steps), *PLAIN, *cached, f"max_steps={steps}")
        train.run(config.model_copy(update={"global_batch_size": 4}))
        (file,) = (tmp_path / "cache").glob("reference-*/errors-*.safetensors")
        found.append(load_file(file))
    assert [len(file["cells"]) for file in found] == [4, 20]
    assert torch.equal(found[1]["cells"][:4], found[0]["cells"])
    assert torch.equal(found[1]["errors"][:4], found[0]["errors"])


def test_a_run_that_was_stopped_goes_on_with_the_same_errors(tiny_sd: Path, tiny_pairs: Path, tmp_path: Path):
    cached = ["reference.type=cached", "reference.num_draws=2", "model.lora=null", "evaluation.share=0"]
    trained(tiny_sd, tiny_pairs, tmp_path / "whole", *cached)
    trained(tiny_sd, tiny_pairs, tmp_path / "parts", *cached, "max_steps=4")
    shutil.rmtree(tmp_path / "parts" / "cache")  # made again from the base, not from the weights of step 4
    trained(tiny_sd, tiny_pairs, tmp_path / "parts", *cached)
    assert final_state(tmp_path / "parts") == final_state(tmp_path / "whole")


@pytest.mark.parametrize("fault", ["cut off", "one bit"])
def test_a_damaged_file_is_named_and_made_again(
    tiny_sd: Path, tiny_pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], fault: str
):
    cached = ["reference.type=cached", f"cache_dir={tmp_path / 'cache'}"]
    first = trained(tiny_sd, tiny_pairs, tmp_path / "first", *cached)
    (file,) = (tmp_path / "cache").glob("reference-*/errors-*.safetensors")
    whole = file.read_bytes()
    damaged = bytearray(whole)
    damaged[-3] ^= 1
    file.write_bytes(whole[:-5] if fault == "cut off" else bytes(damaged))
    assert trained(tiny_sd, tiny_pairs, tmp_path / "second", *cached) == first
    assert f"{file} is damaged" in capsys.readouterr().out
    assert file.read_bytes() == whole


def test_errors_of_another_base_or_of_other_draws_are_not_taken(tiny_sd: Path, tiny_pairs: Path, tmp_path: Path):
    """Another seed has a folder of its own; one that somebody renamed is refused, and says what differs."""
    cached = ["reference.type=cached", f"cache_dir={tmp_path / 'cache'}"]
    for seed in (1, 2):
        trained(tiny_sd, tiny_pairs, tmp_path / str(seed), *cached, f"seed={seed}")
    one, other = (tmp_path / "cache").glob("reference-*")
    assert {json.loads((folder / "facts.json").read_text())["draws"]["seed"] for folder in (one, other)} == {1, 2}
    for file in one.iterdir():
        shutil.copy(file, other / file.name)
    seed = json.loads((one / "facts.json").read_text())["draws"]["seed"]
    with pytest.raises(
        ConfigError, match=r"is not what its name says, but of another choice of draws \(draws: .*cache_dir"
    ):
        trained(tiny_sd, tiny_pairs, tmp_path / "third", *cached, f"seed={3 - seed}")


def test_the_errors_are_looked_up_by_draw_and_example_not_by_place(tiny_sd: Path, tiny_pairs: Path, tmp_path: Path):
    """A file in another order says the same."""
    cached = ["reference.type=cached", f"cache_dir={tmp_path / 'cache'}"]
    first = trained(tiny_sd, tiny_pairs, tmp_path / "first", *cached)
    (file,) = (tmp_path / "cache").glob("reference-*/errors-*.safetensors")
    tensors = {name: tensor.flip(0).contiguous() for name, tensor in load_file(file).items()}
    from diffusion_dpo.training.reference import _digest

    digest = _digest(tensors["cells"].numpy(), tensors["errors"].numpy())
    save_file(tensors, file, metadata={"sha256": digest})
    assert trained(tiny_sd, tiny_pairs, tmp_path / "second", *cached) == first


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["reference.type=cached", "regularizers.drift=1"], "regularizers.drift is about what the reference predicts"),
        (["reference.type=cached", "loss.type=sft"], "reference.type=cached, and loss.type=sft has no reference"),
        (["reference.type=frozen_copy", "loss.type=mapo"], "reference.type=frozen_copy, and loss.type=mapo has no"),
    ],
)
def test_what_does_not_go_together_is_refused(
    tiny_sd: Path, tiny_pairs: Path, tmp_path: Path, overrides: list[str], message: str
):
    with pytest.raises(ConfigError, match=message):
        trained(tiny_sd, tiny_pairs, tmp_path, *overrides)


# --- the average that a run ends with --------------------------------------------------------------------------------


def test_ema_saves_the_average_of_the_weights_and_trains_as_without(tiny_sd: Path, tiny_pairs: Path, tmp_path: Path):
    plain = trained(tiny_sd, tiny_pairs, tmp_path / "plain", "evaluation.share=0", "checkpoints_total_limit=6")
    average = trained(tiny_sd, tiny_pairs, tmp_path / "ema", "evaluation.share=0", "ema_decay=0.5")
    assert average == plain
    parts = {
        name: load_file(tmp_path / name / "adapter" / "pytorch_lora_weights.safetensors") for name in ("plain", "ema")
    }
    last = tmp_path / "ema" / "checkpoints" / "step-00000006"
    trained_weights, ema = load_file(last / "trained.safetensors"), load_file(last / "ema.safetensors")
    name = next(name for name in ema if "lora_B" in name)
    saved = "unet." + name.replace(".default.", ".")
    assert torch.equal(parts["ema"][saved], ema[name]) and torch.equal(parts["plain"][saved], trained_weights[name])
    steps = [
        load_file(tmp_path / "plain" / "checkpoints" / f"step-{step:08d}" / "trained.safetensors")[name]
        for step in (2, 4, 6)
    ]
    assert not torch.equal(ema[name], steps[-1])
    assert ema[name].norm() < steps[-1].norm()  # B starts at 0


OPTIMIZERS = {"adafactor": ["optimizer=adafactor"], "ema": ["ema_decay=0.9"]}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_what_else_has_state_is_resumed_bit_for_bit(tiny_sd: Path, tiny_pairs: Path, tmp_path: Path, kind: str):
    settings = [*OPTIMIZERS[kind], "model.lora=null", "learning_rate=1e-4", "evaluation.share=0"]
    trained(tiny_sd, tiny_pairs, tmp_path / "whole", *settings)
    for steps in (1, 3, 6):
        trained(tiny_sd, tiny_pairs, tmp_path / "parts", *settings, f"max_steps={steps}")
    assert final_state(tmp_path / "parts") == final_state(tmp_path / "whole")


def test_8_bit_adam_is_refused_where_it_cannot_run(tiny_sd: Path, tiny_pairs: Path, tmp_path: Path):
    with pytest.raises(ConfigError, match="optimizer=adamw_8bit needs cuda, not cpu; take adamw or adafactor"):
        trained(tiny_sd, tiny_pairs, tmp_path, "optimizer=adamw_8bit", "device=cpu")
