"""A run goes by the content of what it reads: a base, an adapter or data that moved are the same, others are not."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from diffusion_dpo import compare, generate, train
from diffusion_dpo.config import ConfigError, load, validate
from diffusion_dpo.data.shards import PAIRS, read_rows, write_shard
from diffusion_dpo.sampling import adapter_hash
from diffusion_dpo.settings import CompareConfig, GenerateConfig
from tests.runs import make_config

SHORT = ("preview=null", "evaluation.share=0", "max_steps=2")


@pytest.fixture(scope="module")
def trained(tiny_sd: Path, tiny_pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run, of a start that lies in another folder."""
    root = tmp_path_factory.mktemp("trained")
    train.run(make_config(tiny_sd, tiny_pairs, root / "start", *SHORT, "max_steps=1"))
    train.run(make_config(tiny_sd, tiny_pairs, root / "run", *SHORT, f"model.adapter_path={root}/start"))
    return root


@pytest.fixture
def elsewhere(trained: Path, tiny_sd: Path, tiny_pairs: Path, tmp_path: Path) -> Path:
    """The same run, base, start and data, in other places and by other names."""
    for source, name in ((tiny_sd, "base"), (tiny_pairs, "pairs"), (trained / "start", "first"), (trained, "all")):
        shutil.copytree(source, tmp_path / name)
    return tmp_path


@pytest.mark.parametrize("relative", [False, True])
def test_training_goes_on_where_its_inputs_moved(
    elsewhere: Path, relative: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root = Path() if relative else elsewhere
    monkeypatch.chdir(elsewhere)
    settings = [*SHORT, "max_steps=4", f"model.adapter_path={root / 'first' / 'adapter'}"]
    train.run(make_config(root / "base", root / "pairs", root / "all" / "run", *settings))
    out = capsys.readouterr().out
    assert "continuing after step 2 of 4" in out and "are encoded already" in out


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        (["learning_rate=1e-4"], "learning_rate: 0.001 -> 0.0001"),
        (["data.path=fewer"], "data.num_rows: 10 -> 9"),
        (["model.adapter_path=null"], "base_weights: "),
    ],
)
def test_what_is_another_run_is_refused_with_the_way_to_go_on(
    elsewhere: Path, changes: list[str], line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(elsewhere)
    Path("fewer").mkdir()
    write_shard(Path("fewer/pairs-00000.parquet"), list(read_rows(Path("pairs")))[:9], PAIRS)
    settings = [*SHORT, "model.adapter_path=first", *changes]
    with pytest.raises(ConfigError) as caught:
        train.run(make_config(Path("base"), Path("pairs"), Path("all/run"), *settings))
    text = str(caught.value)
    assert line in text and "output_dir=ANOTHER model.adapter_path=all/run" in text
    assert len(text.splitlines()) <= 4 and max(map(len, text.splitlines())) < 120


def _generate(base: Path, adapter: Path, folder: Path) -> None:
    settings = [f"model.pretrained={base}", f"model.adapter_path={adapter}", "num_images_per_prompt=1"]
    drawn = ["sampling.num_inference_steps=1", "sampling.resolution_px=32", f"output_dir={folder}/out"]
    generate.run(load(GenerateConfig, None, [*settings, *drawn, f"prompts_path={folder}/prompts.txt"]))


def _compare(base: Path, adapter: Path, folder: Path) -> None:
    settings = {
        "baseline": {"pretrained": str(base)},
        "models": {"tuned": {"adapter_path": str(adapter)}},
        "prompts_path": str(folder / "prompts.txt"),
        "sampling": {"num_inference_steps": 1, "resolution_px": 32},
        "scorers": ["brightness"],
        "distance": None,
        "diversity": None,
        "output_dir": str(folder / "out"),
    }
    compare.run(validate(CompareConfig, settings, where="the test"))


@pytest.mark.parametrize("verb", [_generate, _compare])
def test_images_are_drawn_once_wherever_the_model_lies(
    verb: Callable[[Path, Path, Path], None],
    elsewhere: Path,
    trained: Path,
    tiny_sd: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (elsewhere / "prompts.txt").write_text("a fox")
    verb(tiny_sd, trained / "run", elsewhere)
    monkeypatch.chdir(elsewhere)
    for drawing in ("generate.draw", "comparing.drawing.draw"):
        monkeypatch.setattr(f"diffusion_dpo.{drawing}", None)
    (elsewhere / "all/run/adapter/pytorch_lora_weights.safetensors").rename("mine.safetensors")
    assert adapter_hash(elsewhere / "mine.safetensors") == adapter_hash(trained / "run")
    verb(Path("base"), Path("mine.safetensors"), elsewhere)
    if verb is _generate:
        with pytest.raises(ConfigError, match=r"model.weights: \w{8} -> \w{8}\n"):
            verb(Path("base"), Path("first"), elsewhere)
    else:
        report = (elsewhere / "out" / "report.json").read_text() + (elsewhere / "out" / "report.html").read_text()
        assert str(elsewhere) not in report and str(tiny_sd) not in report


def test_a_whole_unet_is_the_same_files_wherever_its_base_lay(
    tiny_sd: Path, elsewhere: Path, tiny_pairs: Path, tmp_path: Path
) -> None:
    for base, name in ((tiny_sd, "here"), (elsewhere / "base", "there")):
        train.run(make_config(base, tiny_pairs, tmp_path / name, *SHORT, "max_steps=1", "model.lora=null"))
    files = {name: sorted((tmp_path / name / "unet").iterdir()) for name in ("here", "there")}
    assert [file.read_bytes() for file in files["here"]] == [file.read_bytes() for file in files["there"]]
    assert str(tiny_sd).encode() not in files["here"][0].read_bytes()
