"""`report` reads whatever a run folder holds, writes one page, and leaves the run as it was."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from diffusion_dpo import train
from diffusion_dpo.card import report_command
from diffusion_dpo.cli import main
from diffusion_dpo.config import ConfigError, dump, load
from diffusion_dpo.run_report import run
from diffusion_dpo.settings import ReportConfig, TrainConfig
from tests.photos import folder_hash
from tests.report.training_runs import make_lines
from tests.runs import make_config


def make_run(folder: Path, *overrides: str, num_steps: int = 60, every: int = 20) -> Path:
    """A run folder as `train` leaves it, without its weights."""
    (folder / "cache").mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(make_lines(num_steps, every=every)))
    config = load(TrainConfig, None, [f"output_dir={folder}", "max_steps=60", *overrides])
    (folder / "config.yaml").write_text(dump(config))
    (folder / "environment.json").write_text('{"torch": "2.9.1"}')
    facts = {"steps": 60, "num_pairs": 819, "num_held_out": 42, "labelled_by": ["clip_text"]}
    (folder / "manifest.json").write_text(json.dumps({"made_by": "train", "complete": True, "identity": {}, **facts}))
    return folder


def add_previews(folder: Path, *steps: int, prompt: str | None = None, amount: int = 2) -> None:
    info = PngInfo()
    if prompt is not None:
        info.add_itxt("prompt", prompt)
    for step in steps:
        (folder / "previews" / f"step-{step:08d}").mkdir(parents=True)
        for number in range(amount):
            Image.new("RGB", (16, 16), (step, 80 * number, 0)).save(
                folder / "previews" / f"step-{step:08d}" / f"{number:02d}.png", pnginfo=info
            )


def report(folder: Path, *overrides: str) -> str:
    page = run(load(ReportConfig, None, [f"path={folder}", *overrides]))
    return page.read_text("utf-8")


def test_the_page_is_all_that_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_run(tmp_path / "run")
    add_previews(folder, 0, 60, prompt="a red circle")
    before = folder_hash(folder)
    text = report(folder)
    out = capsys.readouterr().out
    assert out.startswith("Held-out accuracy is 0.65 ± 0.03, better than chance.\n- Held-out accuracy")
    assert out.endswith(f"page: {folder / 'report.html'}\n")
    assert "a red circle" in text and "2.9.1" in text and "819, and 42 held out" in text and "clip_text" in text
    assert report(folder) == text, "the same run gives the same page"
    (folder / "report.html").unlink()
    assert folder_hash(folder) == before
    assert report(folder / "metrics.jsonl", f"output_dir={tmp_path / 'out' / 'deep'}").count("<img") == 5
    assert [path.name for path in (tmp_path / "out" / "deep").iterdir()] == ["report.html"]
    assert folder_hash(folder) == before


def test_a_run_goes_on_after_its_report(
    tiny_sd: Path, tiny_pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A real run, without prompts of its own: the report takes them from the previews, and train takes no offence."""
    settings = ["max_steps=2", "preview.prompts=[]", "evaluation.share=0.3", "evaluation.num_timesteps=2"]
    train.run(make_config(tiny_sd, tiny_pairs, tmp_path, *settings))
    out = capsys.readouterr().out
    assert f"look: diffusion-dpo report {tmp_path}\nnext: diffusion-dpo compare" in out
    text = report(tmp_path)
    prompts = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])
    assert prompts["step"] == 1 and "By noise level" in text
    assert "prompt 1<" not in text and text.count('class="caption"') == 4
    train.run(make_config(tiny_sd, tiny_pairs, tmp_path, *settings[1:], "max_steps=3"))
    assert "continuing after step 2 of 3" in capsys.readouterr().out
    assert (tmp_path / "report.html").read_text("utf-8") == text
    assert "step 3" in report(tmp_path)


def test_a_path_with_an_equals_sign_is_a_setting() -> None:
    assert report_command(Path("runs/train")) == "diffusion-dpo report runs/train"
    assert report_command(Path("runs/lr=1e-5")) == "diffusion-dpo report path=runs/lr=1e-5"


def test_torch_is_not_waited_for(tmp_path: Path) -> None:
    program = (
        "import sys; from diffusion_dpo.cli import main\n"
        "code = main(['report', sys.argv[1]])\n"
        "heavy = {'torch', 'diffusers', 'transformers', 'pyarrow'} & sys.modules.keys()\n"
        "sys.exit(code or ', '.join(heavy) or 0)"
    )
    folder = make_run(tmp_path / "run")
    done = subprocess.run([sys.executable, "-c", program, str(folder)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# --- runs of every kind ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["loss=mapo"], "mapo"),
        (["loss=sft"], "sft"),
        (["loss=kto", "data=labelled", "data.path=x"], "kto beta=10000"),
        (["model.lora.rank=4"], "LoRA, rank: 4"),
        (["model.lora.rank=null", "model.adapter_path=x"], "LoRA, rank: that of its start"),
        (["model.lora=null", "safeguard_mu=0.9", "warmup_steps=5"], "after 5 steps of warm-up"),
    ],
    ids=" ".join,
)
def test_every_objective_has_a_page(overrides: list[str], says: str, tmp_path: Path) -> None:
    assert says in report(make_run(tmp_path / "run", *overrides, every=10**9))


def test_objectives_without_a_reference_are_told_by_the_settings(tmp_path: Path) -> None:
    def lines(folder: Path) -> None:
        rows = [json.loads(line) | {"rewards/margins": 99.0} for line in make_lines(60)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    for name, loss, is_told in (("a", "dpo", True), ("b", "mapo", False)):
        lines(make_run(tmp_path / name, f"loss={loss}"))
        assert ("The mean margin of rewards was beyond" in report(tmp_path / name)) is is_told


def test_a_run_that_is_at_work(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", "max_steps=500")
    (folder / "manifest.json").write_text('{"made_by": "train", "complete": false, "identity": {}}')
    text = (folder / "metrics.jsonl").read_text()
    (folder / "metrics.jsonl").write_text(text[:-40])
    page = report(folder)
    assert "59 of 500 steps are taken so far" in page and "half-written" in page and "of 500" in page


def test_what_is_missing_or_damaged_is_said(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    add_previews(folder, 0, 20, 40, amount=3)
    (folder / "previews" / "step-00000020" / "01.png").write_bytes(b"not an image")
    (folder / "previews" / "step-00000040" / "02.png").unlink()
    (folder / "previews" / "step-nonsense").mkdir()
    (folder / "environment.json").unlink()
    (folder / "config.yaml").write_text("max_stepss: 3")
    text = report(folder)
    assert "1 preview could not be read" in text and "prompt 3" in text
    assert "The settings of the run are not shown: 1 problem in" in text and "max_stepss" in text
    assert text.count("Enlarge step") == 7
    shutil.rmtree(folder / "previews")
    (folder / "config.yaml").unlink()
    text = report(folder)
    assert "config.yaml is missing" in text and "Previews" not in text
    assert "Previews" not in report(make_run(tmp_path / "other"), "num_previews=0")


def test_many_previews_are_thinned_out(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    add_previews(folder, *range(60), amount=1)
    text = report(folder, "num_previews=4")
    assert text.count("Enlarge step") == 4 and "56 steps between these are left out" in text
    assert "step 59" in text


# --- no run ----------------------------------------------------------------------------------------------------------


def no_folder(path: Path) -> None:
    pass


def empty_folder(path: Path) -> None:
    path.mkdir()


def a_file(path: Path) -> None:
    path.write_text("x")


def pairs(path: Path) -> None:
    path.mkdir()
    (path / "manifest.json").write_text('{"made_by": "pair"}')
    (path / "pairs-00000.parquet").write_bytes(b"")


def demo(path: Path) -> None:
    make_run(path / "train")


def no_step_yet(path: Path) -> None:
    make_run(path)
    (path / "metrics.jsonl").write_text("")


def nothing_whole(path: Path) -> None:
    make_run(path)
    (path / "metrics.jsonl").write_text('\x00\x00\n{"step": 1, "lo')


def failed_early(path: Path) -> None:
    make_run(path)
    (path / "metrics.jsonl").unlink()


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (no_folder, "there is no folder .*run; name a run of `train`"),
        (empty_folder, "run is not a training run: it has no metrics.jsonl .it is empty."),
        (a_file, "run is not a training run: it is a file"),
        (pairs, "it was made by `pair`, and has no metrics.jsonl; name the output_dir of `train`"),
        (demo, "metrics.jsonl is not there, but in .*run/train; name one of these"),
        (no_step_yet, "metrics.jsonl has no step to report on: no step is finished yet"),
        (nothing_whole, "has no step to report on: .*half-written.* 1 line could not be read. Train first"),
        (failed_early, "so that no step was taken; the train command that made it goes on from there"),
    ],
)
def test_what_is_no_run_is_one_sentence(
    make: Callable[[Path], None], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(tmp_path / "run")
    with pytest.raises(ConfigError, match=says):
        run(ReportConfig(path=tmp_path / "run"))
    assert main(["report", str(tmp_path / "run")]) == 2
    assert capsys.readouterr().err.startswith("error: ")
    assert not list(tmp_path.rglob("report.html"))


def test_the_settings_of_a_run_are_read_and_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither report, push nor compare imports a class that a run's config.yaml names; training imports its own."""
    monkeypatch.chdir(tmp_path)
    Path("canary.py").write_text("open('IMPORTED', 'w')\nclass Evil: pass\n")
    blocks = ("model", "data", "loss")
    Path("run/checkpoints/step-00000001").mkdir(parents=True)
    (tmp_path / "run" / "adapter").mkdir()
    (tmp_path / "run" / "adapter" / "pytorch_lora_weights.safetensors").touch()
    Path("run/config.yaml").write_text("".join(f"{name}:\n  type: canary:Evil\n  size: 3\n" for name in blocks))
    Path("run/metrics.jsonl").write_text('{"step": 1, "loss": 0.69, "grad_norm": 1.0, "learning_rate": 1e-5}\n')
    facts = {"num_pairs": 1, "num_held_out": 0, "steps": 1}
    Path("run/manifest.json").write_text(json.dumps({"made_by": "train", "complete": True, "identity": {}, **facts}))
    assert main(["report", "run"]) == 0
    assert "canary:Evil" in Path("run/report.html").read_text()
    assert main(["push", "path=run"]) == 0
    checkpoint = "models.tuned.adapter_path=run/checkpoints/step-00000001"
    assert main(["compare", checkpoint, "num_prompts=1", "output_dir=compared"]) == 2
    assert "is of a model of somebody's own, canary:Evil" in capsys.readouterr().err
    assert not Path("IMPORTED").exists()
    assert main(["train", "run/config.yaml"]) == 2
    assert Path("IMPORTED").exists()
