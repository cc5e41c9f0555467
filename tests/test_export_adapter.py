"""`export` of tuned models: each format comes back, through diffusers' own loaders, as the model that went out."""

import errno
import hashlib
import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
from diffusers.training_utils import _collate_lora_metadata
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel

from diffusion_dpo import export
from diffusion_dpo.cli import main
from diffusion_dpo.config import ConfigError, load
from diffusion_dpo.exporting import adapter as exporting
from diffusion_dpo.exporting.facts import read_facts
from diffusion_dpo.exporting.lora import as_kohya
from diffusion_dpo.files import alone_in
from diffusion_dpo.models.pipeline import POCKET_DIR
from diffusion_dpo.settings import ExportConfig
from tests.fakes import make_stable_diffusion, make_stable_diffusion_xl

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
CONVOLUTIONS = ["conv1", "conv2", "conv_in", "conv_shortcut", "time_emb_proj", "downsamplers.0.conv"]
TEXT = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1"]
FORMATS = ["diffusers", "kohya", "merged", "single_file"]
PIPELINES = {"sd": StableDiffusionPipeline, "xl": StableDiffusionXLPipeline}


class Made:
    """A base, a LoRA of it as diffusers saves one, and what the model in memory draws."""

    def __init__(self, base: Path, folder: Path, unet: LoraConfig, text: LoraConfig | None = None) -> None:
        self.base, self.folder = base, folder
        pipeline = DiffusionPipeline.from_pretrained(base)
        self.kind = type(pipeline)
        self.before = image(pipeline)
        torch.manual_seed(1)
        parts = {"unet": unet}
        if text is not None:
            parts |= {name: text for name in ("text_encoder", "text_encoder_2") if name in pipeline.components}
        for part, config in parts.items():
            pipeline.components[part].add_adapter(config)
        self.after = image(pipeline)
        layers = {part: get_peft_model_state_dict(pipeline.components[part]) for part in parts}
        self.kind.save_lora_weights(
            folder,
            **{f"{part}_lora_layers": weights for part, weights in layers.items()},
            **_collate_lora_metadata({part: pipeline.components[part] for part in parts}),
        )


def image(pipeline: Any) -> np.ndarray:
    pipeline.set_progress_bar_config(disable=True)
    noise = torch.randn((1, 4, 8, 8), generator=torch.Generator().manual_seed(0)).to(pipeline.unet.dtype)
    drawn = pipeline("a red fox", latents=noise, num_inference_steps=2, guidance_scale=3.0)
    return np.asarray(drawn.images[0], dtype=int)


def lora(*targets: str, **settings: Any) -> LoraConfig:
    return LoraConfig(
        **{"r": 4, "lora_alpha": 16, "init_lora_weights": False} | settings, target_modules=list(targets)
    )


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    return {"sd": make_stable_diffusion(folder / "sd"), "xl": make_stable_diffusion_xl(folder / "xl")}


@pytest.fixture(scope="module")
def made(bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Made]:
    """A LoRA of a family: `plain` with rank 4 and alpha 16, or `all` kinds of layers, patterns, text encoders."""
    known: dict[tuple[str, str], Made] = {}

    def make(family: str, what: str) -> Made:
        if (family, what) not in known:
            folder = tmp_path_factory.mktemp("loras") / f"{family}-{what}"
            if what == "plain":
                configs = [lora(*ATTENTION)]
            elif what == "dora":
                configs = [lora(*ATTENTION, use_dora=True)]
            else:
                patterns = {
                    "rank_pattern": {"conv1": 2, "mid_block.*to_k": 3},
                    "alpha_pattern": {"to_q": 2, "conv1": 5},
                }
                configs = [
                    lora(*ATTENTION, *CONVOLUTIONS, "proj_in", "ff.net.0.proj", **patterns),
                    lora(*TEXT, r=2, lora_alpha=6),
                ]
            known[family, what] = Made(bases[family], folder, *configs)
        return known[family, what]

    return make


def run(model: Made, out: Path, *overrides: str) -> Path:
    settings = [f"adapter_path={model.folder}", f"pretrained={model.base}", f"output_dir={out}", *overrides]
    return export.run(load(ExportConfig, None, settings))


def load_plainly(model: Made, out: Path, format_: str) -> Any:
    """As the documentation of diffusers says, and nothing of ours."""
    if format_ == "merged":
        return model.kind.from_pretrained(out, dtype=torch.float32)
    if format_ == "single_file":
        (file,) = out.glob("*.safetensors")
        return model.kind.from_single_file(str(file), config=str(model.base), dtype=torch.float32)
    pipeline = model.kind.from_pretrained(model.base)
    pipeline.load_lora_weights(out)
    return pipeline


def nothing_left(out: Path) -> bool:
    return not out.exists()


# --- what goes out comes back ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("format_", FORMATS)
@pytest.mark.parametrize(("family", "what"), [("sd", "plain"), ("sd", "all"), ("xl", "all")])
def test_every_format_draws_the_same_images(
    made: Callable[[str, str], Made], family: str, what: str, format_: str, tmp_path: Path
) -> None:
    model = made(family, what)
    assert np.abs(model.after - model.before).mean() > 3, "an adapter that does nothing would prove nothing"
    out = run(model, tmp_path / "out", f"format={format_}", "dtype=fp32")
    assert np.abs(image(load_plainly(model, out, format_)) - model.after).max() <= 1
    assert not list(out.glob(".staging*"))
    facts = json.loads((out / "manifest.json").read_text())
    assert facts["complete"] and facts["changes"]["unet"] > 100 * facts["differences"]["unet"]


def test_kohyas_names_carry_the_true_alpha(made: Callable[[str, str], Made], tmp_path: Path) -> None:
    weights = load_file(run(made("sd", "plain"), tmp_path / "a", "format=kohya") / "sd-plain.safetensors")
    alphas = {key: float(value) for key, value in weights.items() if key.endswith(".alpha")}
    assert set(alphas.values()) == {16.0}
    key = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_out_0"
    assert weights[f"{key}.lora_down.weight"].shape == (4, 16) and weights[f"{key}.lora_up.weight"].shape == (16, 4)
    assert {value.dtype for name, value in weights.items() if "lora_" in name[10:]} == {torch.float16}
    half = run(made("sd", "plain"), tmp_path / "b", "format=kohya", "adapter_scale=0.5")
    assert float(load_file(half / "sd-plain.safetensors")[f"{key}.alpha"]) == 8.0


def test_layers_of_every_kind_keep_their_product(made: Callable[[str, str], Made], tmp_path: Path) -> None:
    """Alpha over rank times B A, layer by layer, whatever the patterns: what every reader of the format computes."""
    model = made("xl", "all")
    source = load_file(model.folder / "pytorch_lora_weights.safetensors")
    out = load_file(run(model, tmp_path / "out", "format=kohya", "dtype=fp32") / "xl-all.safetensors")
    assert {name.split("_")[1] for name in out} == {"unet", "te1", "te2"}
    prefixes = {"unet": "lora_unet_", "text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}
    seen = 0
    for key, down in source.items():
        if not key.endswith(".lora_A.weight"):
            continue
        part, _, path = key.removesuffix(".lora_A.weight").partition(".")
        up = source[key.replace("lora_A", "lora_B")]
        path_there = path if part == "unet" or path.startswith("text_model.") else f"text_model.{path}"
        name = prefixes[part] + path_there.replace(".", "_")
        alpha = 6 if part != "unet" else 2 if "to_q" in path else 5 if "conv1" in path else 16
        expected = alpha / len(down) * up.flatten(1) @ down.flatten(1)
        there_down, there_up = out[f"{name}.lora_down.weight"], out[f"{name}.lora_up.weight"]
        found = float(out[f"{name}.alpha"]) / len(there_down) * there_up.flatten(1) @ there_down.flatten(1)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
        seen += 1
    assert seen * 3 == len(out)


def test_the_header_says_what_people_look_for_and_is_the_same_every_time(
    made: Callable[[str, str], Made], tmp_path: Path
) -> None:
    model = made("xl", "all")
    first, second = (run(model, tmp_path / name, "format=kohya") / "xl-all.safetensors" for name in "ab")
    assert first.read_bytes() == second.read_bytes()
    with safe_open(first, framework="pt") as file:
        header = file.metadata()
    assert str(tmp_path) not in json.dumps(header) and str(model.base) not in json.dumps(header)
    assert header["ss_network_module"] == "networks.lora" and header["ss_output_name"] == "xl-all"
    assert (header["ss_network_dim"], header["ss_base_model_version"]) == ("Dynamic", "sdxl_base_v1-0")
    assert header["modelspec.architecture"] == "stable-diffusion-xl-v1-base/lora"
    assert (header["modelspec.prediction_type"], header["modelspec.resolution"]) == ("epsilon", "64x64")
    data = first.read_bytes()
    start = 8 + struct.unpack("<Q", data[:8])[0]
    assert header["modelspec.hash_sha256"] == "0x" + hashlib.sha256(data[start:]).hexdigest()


def test_dora_stays_itself_or_is_merged_and_is_refused_by_name(
    made: Callable[[str, str], Made], tmp_path: Path
) -> None:
    model = made("sd", "dora")
    with pytest.raises(ConfigError, match=r"a DoRA \(unet\..*a DoRA can be merged"):
        run(model, tmp_path / "kohya", "format=kohya")
    assert nothing_left(tmp_path / "kohya")
    for format_ in ("diffusers", "merged"):
        out = run(model, tmp_path / format_, f"format={format_}", "dtype=fp32")
        assert np.abs(image(load_plainly(model, out, format_)) - model.after).max() <= 1


def test_a_whole_unet_becomes_a_checkpoint_and_no_lora(bases: dict[str, Path], tmp_path: Path) -> None:
    other = make_stable_diffusion(tmp_path / "other", seed=7)
    settings = [f"adapter_path={other / 'unet'}", f"pretrained={bases['sd']}", f"output_dir={tmp_path / 'out'}"]
    with pytest.raises(ConfigError, match=r"a whole UNet, not a LoRA; export it with format=single_file"):
        export.run(load(ExportConfig, None, [*settings, "format=kohya"]))
    export.run(load(ExportConfig, None, [*settings, "format=single_file", "dtype=fp32"]))
    (file,) = (tmp_path / "out").glob("*.safetensors")
    loaded = StableDiffusionPipeline.from_single_file(str(file), config=str(bases["sd"]), dtype=torch.float32)
    expected = load_file(other / "unet" / "diffusion_pytorch_model.safetensors")
    found = loaded.unet.state_dict()
    assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in expected)


def test_the_pocket_model_has_the_original_layout_too(tmp_path: Path) -> None:
    model = Made(POCKET_DIR, tmp_path / "lora", lora(*ATTENTION))
    run(model, tmp_path / "out", "pretrained=pocket", "format=single_file")


def test_the_text_encoder_of_stable_diffusion_2_gets_open_clips_names(tmp_path: Path) -> None:
    base = make_stable_diffusion(tmp_path / "base", prediction_type="v_prediction")
    pipeline = StableDiffusionPipeline.from_pretrained(base)
    settings = pipeline.text_encoder.config
    settings.hidden_act = "gelu"
    pipeline.register_modules(text_encoder=CLIPTextModel(settings))
    pipeline.save_pretrained(base)
    model = Made(base, tmp_path / "lora", lora(*ATTENTION), lora(*TEXT))
    out = run(model, tmp_path / "out", "format=single_file", "dtype=fp32")
    names = set(load_file(out / "lora.safetensors"))
    assert "cond_stage_model.model.transformer.resblocks.1.attn.in_proj_weight" in names
    assert np.abs(image(load_plainly(model, out, "single_file")) - model.after).max() <= 1


# --- what is not right is not kept -----------------------------------------------------------------------------------


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


@pytest.mark.parametrize("format_", ["merged", "single_file"])
def test_a_lora_that_is_merged_wrongly_is_not_kept(
    made: Callable[[str, str], Made], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format_: str
) -> None:
    """What is written is then what is in memory; it has to be compared with what was there before."""
    fuse = StableDiffusionPipeline.fuse_lora
    monkeypatch.setattr(StableDiffusionPipeline, "fuse_lora", lambda *a, **kw: fuse(*a, **kw, lora_scale=0.25))
    for dtype in ("fp32", "fp16"):
        with pytest.raises(ConfigError, match=r"merged, this is not the same model: the unet is off by"):
            run(made("sd", "plain"), tmp_path / "out", f"format={format_}", f"dtype={dtype}")
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
    assert "1 of the" in (text := capsys.readouterr().err) and "find none in the model" in text
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
    run(model, out, "format=kohya")
    assert (out / "sd-plain.safetensors").read_bytes() == before


def test_a_rerun_finds_it_there_and_another_is_refused(
    made: Callable[[str, str], Made], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, out = made("sd", "plain"), tmp_path / "out"
    run(model, out, "format=kohya")
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    run(model, out, "format=kohya")
    assert "holds this already, verified" in capsys.readouterr().out
    with pytest.raises(ConfigError, match=r"adapter_scale: 1\.0 then, 2\.0 now"):
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


# --- --check ---------------------------------------------------------------------------------------------------------


def check(file: Path, capsys: pytest.CaptureFixture[str], *settings: str) -> tuple[int, str]:
    code = main(["export", "--check", str(file), *settings])
    captured = capsys.readouterr()
    return code, captured.out + captured.err


def test_check_says_what_a_file_is_and_what_it_changes(
    made: Callable[[str, str], Made], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = made("sd", "all")
    kohya = run(model, tmp_path / "k", "format=kohya") / "sd-all.safetensors"
    single = run(model, tmp_path / "s", "format=single_file") / "sd-all.safetensors"
    capsys.readouterr()
    for file, words in (
        (kohya, ("a LoRA in kohya naming", "every layer finds its place", "ss_base_model_version: sd_v1")),
        (model.folder, ("a LoRA in diffusers naming", "of the text encoder", "alpha 16 mostly (2 to 16)")),
        (single, ("a single-file checkpoint", "modelspec.architecture: stable-diffusion-v1")),
    ):
        code, text = check(file, capsys, f"pretrained={model.base}")
        assert code == 0 and "it does something" in text and "unet: changes by" in text, text
        assert all(word in text for word in words), text
    code, text = check(kohya, capsys)
    assert code == 0 and "give pretrained=" in text
    code, text = check(kohya, capsys, f"pretrained={made('xl', 'plain').base}")
    assert code == 2 and "does not fit this model" in text


def test_check_sees_what_is_wrong_with_an_alpha(
    made: Callable[[str, str], Made], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = made("sd", "plain")
    file = run(model, tmp_path / "k", "format=kohya") / "sd-plain.safetensors"
    weights, first = load_file(file), next(key for key in load_file(file) if key.endswith(".alpha"))
    capsys.readouterr()
    save_file(weights, tmp_path / "header.safetensors", metadata={"ss_network_alpha": "4"})
    assert (
        "the header says alpha 4, the weights 16"
        in check(tmp_path / "header.safetensors", capsys, f"pretrained={model.base}")[1]
    )
    for nothing in ("None", "Dynamic"):
        save_file(weights, tmp_path / "silent.safetensors", metadata={"ss_network_alpha": nothing})
        code, text = check(tmp_path / "silent.safetensors", capsys, f"pretrained={model.base}")
        assert code == 0 and "the header says" not in text
    save_file(weights | {first: torch.tensor(2.0)}, tmp_path / "mixed.safetensors")
    assert "with alpha 16 instead of 2" in check(tmp_path / "mixed.safetensors", capsys, f"pretrained={model.base}")[1]
    plain = {key: value for key, value in weights.items() if not key.endswith(".alpha")}
    save_file(plain, tmp_path / "none.safetensors")
    assert "does not say its alpha" in check(tmp_path / "none.safetensors", capsys, f"pretrained={model.base}")[1]
    broken = weights | {first.replace(".alpha", ".lora_up.weight"): torch.full((16, 4), torch.nan)}
    save_file(broken, tmp_path / "nan.safetensors")
    code, text = check(tmp_path / "nan.safetensors", capsys, f"pretrained={model.base}")
    assert code == 2 and "NaN" in text


def _safetensors(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


ENTRY = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "is empty"),
        (b"abc", "is cut off"),
        (b"<!DOCTYPE html><html>", "is a web page"),
        (b"\n <HTML><body>404", "is a web page"),
        (b"PK\x03\x04rest of a zip", "is a pickle of torch.save"),
        (b"\x80\x02}q\x00.aaaa", "is a pickle of torch.save"),
        (b"version https://git-lfs.github.com/spec/v1", "is a git-lfs pointer"),
        (b"\xff" * 64, "is cut off or no safetensors file"),
        (_safetensors({"x": ENTRY}, b"12"), "is cut off"),
        (_safetensors({"x": ENTRY}, b"12345678"), "is longer than it should be"),
        (_safetensors(b"[1, 2]"), "its header cannot be read"),
        (_safetensors(b"[" * 100_000), "its header cannot be read"),
        (_safetensors({"x": 3}), "its header cannot be read"),
        (_safetensors({}), "holds no tensors"),
        (_safetensors({"a\x1b[31m": ENTRY}, b"1234"), "is no LoRA and no checkpoint: it holds a [31m"),
        (_safetensors({"base_model.model.x.lora_A.weight": ENTRY}, b"1234"), "names that peft gives to a bare model"),
    ],
)
def test_check_answers_a_broken_file_in_a_sentence(
    content: bytes, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "x.safetensors"
    file.write_bytes(content)
    code, text = check(file, capsys, "pretrained=pocket")
    assert code == 2 and says in text and "Traceback" not in text and "\x1b" not in text
    assert main(["export", "--check", str(tmp_path / "nothing")]) == 2


@pytest.mark.parametrize("length", [640, 896, 1152, 1408])
def test_a_length_that_begins_as_a_pickle_does_is_no_pickle(length: int, tmp_path: Path) -> None:
    """The first bytes of a file are the length of its header: one of 0x0280 begins with the bytes 80 02."""
    text = json.dumps({"x": ENTRY}).encode().ljust(length)
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", length) + text + b"1234")
    assert read_facts(tmp_path / "x.safetensors").shapes == {"x": (1,)}


def test_check_names_another_family(
    bases: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, text = check(bases["sd"], capsys, f"pretrained={bases['xl']}")
    assert code == 2 and "they are of different families" in text
    file = tmp_path / "flux.safetensors"
    save_file({f"transformer.blocks.0.to_q.lora_{it}.weight": torch.ones(2, 2) for it in "AB"}, file)
    code, text = check(file, capsys, f"pretrained={bases['sd']}")
    assert code == 2 and "is for a model with a transformer" in text
    pipeline = StableDiffusionPipeline.from_pretrained(bases["sd"])
    pipeline.unet.conv_out.weight.data.fill_(torch.nan)
    pipeline.unet.save_pretrained(tmp_path / "unet")
    code, text = check(tmp_path / "unet", capsys, f"pretrained={bases['sd']}")
    assert code == 2 and "the unet computes NaN" in text
