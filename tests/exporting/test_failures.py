"""`export` of tuned models: what is not right is not kept, and nothing of it stays behind."""

import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from diffusion_dpo import export
from diffusion_dpo.cli import main
from diffusion_dpo.config import ConfigError, load
from diffusion_dpo.exporting import adapter as exporting
from diffusion_dpo.exporting.lora import as_kohya
from diffusion_dpo.files import alone_in
from diffusion_dpo.settings import ExportConfig
from tests.exporting.loras import (
    ATTENTION,
    TEXT,
    Made,
    image,
    load_plainly,
    lora,
    nothing_left,
    run,
)


def test_a_file_with_the_wrong_alpha_is_not_kept(
    made: Callable[[str, str], Made], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The converter of diffusers writes alpha = rank: a quarter of what was trained."""

    def like_diffusers(layers: Any, dtype: torch.dtype, *, two_encoders: bool) -> dict[str, torch.Tensor]:
        weights = as_kohya(layers, dtype, two_encoders=two_encoders)
        return {key: torch.tensor(4.0) if key.endswith(".alpha") else value for key, value in weights.items()}

    monkeypatch.setattr(exporting, "as_kohya", like_diffusers)
    with pytest.raises(ConfigError, match=r"is not the model in memory: the unet is off by .* Nothing was kept"):
        run(made("sd", "plain"), tmp_path / "out", "format=kohya")
    assert nothing_left(tmp_path / "out")


def test_a_layer_that_the_model_does_not_have_is_no_loss_in_silence(
    made: Callable[[str, str], Made], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = made("sd", "all")
    file = tmp_path / "more" / "pytorch_lora_weights.safetensors"
    file.parent.mkdir()
    with safe_open(model.folder / file.name, framework="pt") as source:
        weights, header = {key: source.get_tensor(key) for key in source.keys()}, source.metadata()  # noqa: SIM118
    first = next(key for key in weights if key.startswith("text_encoder.") and "lora_A" in key)
    for name in (first, first.replace("lora_A", "lora_B")):
        weights[name.replace("layers.0", "layers.77")] = weights[name].clone()
    save_file(weights, file, metadata=header)
    arguments = [f"adapter_path={file}", f"pretrained={model.base}", f"output_dir={tmp_path / 'out'}"]
    assert main(["export", "format=kohya", *arguments]) == 2
    assert "does not fit this model: 1 of its" in (text := capsys.readouterr().err) and "find none in it" in text
    assert nothing_left(tmp_path / "out")


def test_a_lora_of_the_text_encoder_alone_can_be_merged(bases: dict[str, Path], tmp_path: Path) -> None:
    model = Made(bases["sd"], tmp_path / "lora", lora("to_q", init_lora_weights=True), lora(*TEXT))
    file = model.folder / "pytorch_lora_weights.safetensors"
    save_file({key: value for key, value in load_file(file).items() if key.startswith("text_")}, file)
    run(model, tmp_path / "out", "format=merged")
    facts = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert facts["changes"]["text_encoder"] > 0.01 > facts["changes"]["unet"]  # which is rounded, like all of it


def test_a_lora_with_biases_is_kept_as_it_is_or_refused(bases: dict[str, Path], tmp_path: Path) -> None:
    model = Made(bases["sd"], tmp_path / "lora", lora(*ATTENTION, lora_bias=True))
    out = run(model, tmp_path / "out", "format=diffusers", "dtype=fp32")
    assert np.abs(image(load_plainly(model, out, "diffusers")) - model.after).max() <= 1
    for format_ in ("merged", "kohya"):
        with pytest.raises(ConfigError, match=r"format=diffusers keeps it as it is"):
            run(model, tmp_path / format_, f"format={format_}")
        assert nothing_left(tmp_path / format_)


def test_an_adapter_that_rounding_would_drown_is_not_merged(
    made: Callable[[str, str], Made], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = made("sd", "plain")
    weak = "adapter_scale=0.0005"
    with pytest.raises(ConfigError, match=r"rounding the weights to fp16 moves the unet by .* use dtype=fp32"):
        run(model, tmp_path / "half", "format=merged", weak)
    assert nothing_left(tmp_path / "half")
    run(model, tmp_path / "full", "format=merged", weak, "dtype=fp32")
    run(model, tmp_path / "lora", "format=kohya", weak)
    run(model, tmp_path / "less", "format=merged", "adapter_scale=0.003")
    assert "warning: rounding the weights to fp16 moves the unet by" in capsys.readouterr().out


def test_an_adapter_that_does_nothing_is_named(bases: dict[str, Path], tmp_path: Path) -> None:
    model = Made(bases["sd"], tmp_path / "lora", lora(*ATTENTION, init_lora_weights=True))
    with pytest.raises(ConfigError, match=r"lora does nothing: .* Was it saved before training"):
        run(model, tmp_path / "out", "format=kohya")
    assert nothing_left(tmp_path / "out")
    file = model.folder / "pytorch_lora_weights.safetensors"
    assert main(["export", "--check", str(file), f"pretrained={model.base}"]) == 2


def test_a_killed_run_is_finished_and_one_that_is_at_work_is_left_alone(
    made: Callable[[str, str], Made], tmp_path: Path
) -> None:
    model, out = made("sd", "plain"), tmp_path / "out"
    run(model, out, "format=merged")
    manifest = json.loads((out / "manifest.json").read_text())
    (out / "manifest.json").write_text(json.dumps(manifest | {"complete": False}))
    (out / ".staging-0").mkdir()
    before = {path.name for path in out.iterdir()}
    with alone_in(out), pytest.raises(ConfigError, match="another process is working"):
        run(model, out, "format=merged")
    assert {path.name for path in out.iterdir()} == before, "what another process is making is not touched"
    run(model, out, "format=merged")
    assert json.loads((out / "manifest.json").read_text())["complete"] and not (out / ".staging-0").exists()


@pytest.mark.parametrize("there_before", [False, True])
def test_a_full_disk_leaves_nothing_behind(
    made: Callable[[str, str], Made],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    there_before: bool,
) -> None:
    def full(path: Path, *_: object) -> None:
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(exporting, "write_safetensors", full)
    model, out = made("sd", "plain"), tmp_path / "out"
    if there_before:
        out.mkdir()
    arguments = [f"adapter_path={model.folder}", f"pretrained={model.base}", f"output_dir={out}"]
    assert main(["export", "format=kohya", *arguments]) == 2
    assert "no space left on the disk" in capsys.readouterr().err
    assert [path.name for path in out.iterdir()] == [".lock"] if there_before else nothing_left(out)


def test_a_disk_that_is_full_at_the_very_end_leaves_nothing_and_the_same_command_works(
    made: Callable[[str, str], Made], tmp_path: Path
) -> None:
    model, out = made("sd", "plain"), tmp_path / "out"
    out.mkdir()
    with pytest.MonkeyPatch.context() as patch:

        def full(*_: object, **__: object) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        patch.setattr(exporting, "finish", full)
        with pytest.raises(OSError, match="No space left"):
            run(model, out, "format=kohya")
    assert [path.name for path in out.iterdir()] == [".lock"]
    run(model, out, "format=kohya")
    assert (out / "sd-plain.safetensors").exists()


def test_a_file_that_was_moved_away_is_made_again(made: Callable[[str, str], Made], tmp_path: Path) -> None:
    model, out = made("sd", "plain"), tmp_path / "out"
    run(model, out, "format=kohya")
    before = (out / "sd-plain.safetensors").rename(tmp_path / "mine.safetensors").read_bytes()
    for damaged in (None, before[:-1], before[:-1] + bytes([before[-1] ^ 1])):
        if damaged is not None:
            (out / "sd-plain.safetensors").write_bytes(damaged)
        run(model, out, "format=kohya")
        assert (out / "sd-plain.safetensors").read_bytes() == before
    manifest = json.loads((out / "manifest.json").read_text())
    del manifest["files"]  # as an earlier version left it
    (out / "manifest.json").write_text(json.dumps(manifest))
    run(model, out, "format=kohya")
    assert json.loads((out / "manifest.json").read_text())["files"] == ["sd-plain.safetensors"]


def test_a_rerun_finds_it_there_and_another_is_refused(
    made: Callable[[str, str], Made], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, out = made("sd", "plain"), tmp_path / "out"
    run(model, out, "format=kohya")
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    run(model, out, "format=kohya")
    assert "holds this already, verified" in capsys.readouterr().out
    with pytest.raises(ConfigError, match=r"adapter_scale: 1\.0 -> 2\.0"):
        run(model, out, "format=kohya", "adapter_scale=2")
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before


def test_a_run_folder_says_its_base(made: Callable[[str, str], Made], tmp_path: Path) -> None:
    model, folder = made("sd", "plain"), tmp_path / "my run"
    shutil.copytree(model.folder, folder / "adapter")
    (folder / "metrics.jsonl").touch()
    config = folder / "config.yaml"
    config.write_text(json.dumps({"model": {"type": "stable_diffusion", "pretrained": str(model.base)}}))
    settings = [f"adapter_path={folder}", "format=kohya", f"output_dir={tmp_path / 'out'}"]
    out = export.run(load(ExportConfig, None, settings))
    assert (out / "my-run.safetensors").exists()
    config.write_text("model: 3")
    with pytest.raises(ConfigError, match=r"does not say which model it was trained on; give pretrained"):
        export.run(load(ExportConfig, None, settings))


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (["format=kohya"], "format=kohya needs adapter_path"),
        (["adapter_path=x"], "format=pickapic takes no adapter_path"),
        (["dtype=fp32"], "format=pickapic takes no dtype"),
        (["format=kohya", "adapter_path=x", "data.path=y"], "format=kohya takes no data"),
        (["format=merged", "adapter_path=x", "seed=3"], "format=merged takes no seed"),
    ],
)
def test_a_setting_that_the_format_ignores_is_refused(settings: list[str], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        load(ExportConfig, None, settings)


def test_weights_that_diffusers_does_not_find_are_named(
    made: Callable[[str, str], Made], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As those of SDXL's second text encoder, where both are of one width."""
    model = made("sd", "plain")
    read = model.kind.from_single_file

    def forgetful(*arguments: Any, **settings: Any) -> Any:
        pipeline = read(*arguments, **settings)
        pipeline.unet.conv_in.to("meta")
        return pipeline

    monkeypatch.setattr(model.kind, "from_single_file", forgetful)
    with pytest.raises(ConfigError, match=r"does not find all weights of .*: 2 are left out, e\.g\. unet\.conv_in"):
        run(model, tmp_path / "out", "format=single_file")
    assert nothing_left(tmp_path / "out")
