"""What the documents tell people to type works: commands parse, files are there, the code of extend.md runs."""

import os
import re
import shlex
import subprocess
import sys
import textwrap
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from diffusion_dpo.cli import main
from diffusion_dpo.config import load
from diffusion_dpo.data.shards import encode_png
from diffusion_dpo.scorers import Scorer, ScoreRequest
from diffusion_dpo.settings import VERBS, CompareConfig, PairConfig, ScoreConfig, TrainConfig

ROOT = Path(__file__).parent.parent
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])


def blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def commands() -> list[Any]:
    texts = [(path, block.replace("\\\n", " ")) for path in DOCUMENTS for block in blocks(path, "sh")]
    lines = [(path, line) for path, text in texts for line in text.splitlines()]
    return [pytest.param(line, id=f"{path.name}: {line[:60]}") for path, line in lines if line.strip()]


@pytest.fixture
def extensions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The modules of extend.md, importable."""
    for block in blocks(ROOT / "docs" / "extend.md", "python"):
        name = block.splitlines()[0].removeprefix("# ")
        (tmp_path / name).write_text(block, encoding="utf-8")
        monkeypatch.delitem(sys.modules, name.removesuffix(".py"), raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))


@pytest.mark.usefixtures("extensions")
@pytest.mark.parametrize("line", commands())
def test_command_can_be_typed(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Verbs are replaced by nothing: what is tested is that the command reaches them with settings that hold."""
    monkeypatch.chdir(ROOT)
    program, *arguments = shlex.split(line, comments=True)
    if program == "accelerate":
        assert arguments[:2] == ["launch", "--config_file"] and Path(arguments[2]).exists()
        assert arguments[3:5] == ["-m", "diffusion_dpo"]
        program, arguments = "diffusion-dpo", arguments[5:]
    if program == "diffusion-dpo":
        for verb in (*VERBS, "demo", "doctor", "find_beta", "dry_run", "check", "power", "run_report"):
            module = types.ModuleType(f"diffusion_dpo.{verb}")
            module.run = module.export = lambda *arguments: 0  # type: ignore[attr-defined]
            monkeypatch.setitem(sys.modules, module.__name__, module)
            monkeypatch.setattr(f"diffusion_dpo.{verb}", module, raising=False)
        assert main(arguments) == 0
    elif program.startswith("scripts/"):
        assert os.access(ROOT / program, os.X_OK)
        assert all((ROOT / argument).exists() for argument in arguments if argument.startswith("tests/"))
    elif program == ".venv/bin/python":
        assert arguments[0].startswith("scripts/") and (ROOT / arguments[0]).is_file()
        assert all((ROOT / argument).exists() for argument in arguments if argument.startswith("diffusion_dpo/"))
    else:
        assert program in {"pip", ".venv/bin/pre-commit"}


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_inside_the_repository_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", path.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            assert (path.parent / target).exists(), target


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_config_files_that_are_named_exist(path: Path) -> None:
    for name in re.findall(r"configs/[\w/.]+\.\w+", path.read_text(encoding="utf-8")):
        assert (ROOT / name).exists(), name


def test_settings_named_in_backticks_exist() -> None:
    """Dotted settings in the documents, such as `loss.beta`, are settings of train or compare."""
    from diffusion_dpo.config_help import settings

    known = {re.sub(r"\[\w+\]", "", setting.key) for cls in (TrainConfig, CompareConfig) for setting in settings(cls)}
    known |= {"model.type", "data.type", "loss.type"}
    for path in DOCUMENTS:
        for name in re.findall(r"`((?:model|data|loss|preview|before|after)\.[\w.]+)(?:=[^`]*)?`", path.read_text()):
            assert name in known, f"{path.name}: {name}"


@pytest.mark.usefixtures("extensions")
def test_the_judge_of_extend_md_works() -> None:
    (judge,) = load(ScoreConfig, None, ["scorers=[{type: 'my_judges:Warmth', gain: 2}]"]).scorers
    images = [Image.new("RGB", (32, 32), color) for color in ("red", "blue", "gray")]
    scores = judge.score([ScoreRequest(image) for image in images])
    np.testing.assert_allclose(scores.values["warmth"], [2, -2, 0])
    assert judge.metrics[0].range == (-2, 2)
    assert judge.fingerprint() != type(judge)(type=judge.type).fingerprint()


@pytest.mark.usefixtures("extensions")
def test_the_judge_of_extend_md_is_found_in_the_working_directory(tmp_path: Path) -> None:
    """With -P, as with the console script, the working directory is not on the path by itself."""
    (tmp_path / "images").mkdir()
    Image.new("RGB", (32, 32), "red").save(tmp_path / "images" / "a.png")
    scorers = "scorers=[{type: 'my_judges:Warmth', gain: 2}]"
    command = [sys.executable, "-P", "-m", "diffusion_dpo", "score", "path=images", scorers, "device=cpu"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "images" / "scores-warmth-00000.parquet").is_file()


def test_the_needs_of_extend_md_are_a_property() -> None:
    """As the page shows it, in a class of its own."""
    from typing import Literal

    (body,) = re.findall(r"^  ```python\n(.*?)^  ```", (ROOT / "docs/extend.md").read_text(), re.MULTILINE | re.DOTALL)
    names: dict[str, Any] = {"Scorer": Scorer, "Literal": Literal, "__name__": __name__}
    exec(f"class Judge(Scorer):\n    licence = 'none'\n{textwrap.indent(body, '  ')}", names)
    assert names["Judge"]().needs == {"prompt"}


@pytest.mark.usefixtures("extensions")
def test_the_objective_of_extend_md_works() -> None:
    import torch

    from diffusion_dpo.losses import PairErrors

    loss = load(TrainConfig, None, ["loss.type=my_losses:Hinge", "loss.beta=2"]).loss
    zeros = torch.zeros(3)
    errors = PairErrors(
        chosen=torch.tensor([0.0, -0.5, -2.0]),
        rejected=zeros,
        reference_chosen=zeros,
        reference_rejected=zeros,
        timesteps=zeros.long(),
        log_snr=zeros,
        label_prob=zeros + 1,
    )
    torch.testing.assert_close(loss(errors).loss, torch.tensor([1.0, 0.5, 0.0]))


@pytest.mark.usefixtures("extensions")
def test_the_ranking_of_extend_md_is_dpo_for_two_images() -> None:
    import torch

    from diffusion_dpo.losses import ImageErrors

    numbers = torch.rand(4, 5, 2, generator=torch.Generator().manual_seed(0))
    errors = ImageErrors(
        policy=numbers[0],
        reference=numbers[1],
        drift=None,
        cross=None,
        timesteps=torch.zeros(5).long(),
        log_snr=torch.zeros(5),
        previous_log_snr=torch.zeros(5),
        labels=torch.tensor([[1.0, 0.0]] * 5),
        scores=numbers[2],
    )
    ours, dpo = (load(TrainConfig, None, [f"loss.type={name}"]).loss for name in ("my_image_losses:BestOfList", "dpo"))
    torch.testing.assert_close(ours.over_images(errors).loss, dpo.over_images(errors).loss)
    hinge = load(TrainConfig, None, ["loss.type=my_image_losses:ImageHinge", "loss.beta=2"]).loss
    expected = (1 - (errors.reference - errors.policy)).relu() + (1 + (errors.reference - errors.policy)).relu()
    liked, disliked = (
        hinge.over_images(replace(errors, labels=torch.full((5, 2), label))).loss for label in (1.0, 0.0)
    )
    torch.testing.assert_close(liked + disliked, expected.mean(1))


@pytest.mark.usefixtures("extensions")
def test_the_strategy_of_extend_md_makes_a_chain() -> None:
    from diffusion_dpo.strategies.plan import make_table, pick_pairs

    strategy = load(PairConfig, None, ["strategy=my_strategies:Neighbours"]).strategy
    uids, scores = ["x", "y", "z"], {"a": np.array([1.0, 3.0, 2.0])}
    table, _ = make_table(uids, scores, strategy, main="a", higher_is_better={"a": True}, scale={"a": 1.0})
    picks, _ = pick_pairs(table, strategy)
    assert [(table.uids[pick.chosen], table.uids[pick.rejected]) for pick in picks] == [("y", "z"), ("z", "x")]


@pytest.mark.usefixtures("extensions")
def test_the_data_source_of_extend_md_reads_votes(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    images = [encode_png(Image.new("RGB", (32, 32), color)) for color in ("red", "blue")]
    row = {"prompt": "a cat", "image_a": images[0], "image_b": images[1], "votes_a": 1, "votes_b": 3}
    rows = [row, row | {"votes_a": 0, "votes_b": 0}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "votes.parquet")
    data = load(TrainConfig, None, ["data.type=my_data:Votes", f"data.path={tmp_path}"]).data
    pair, dropped = data.read()
    assert (pair.chosen, pair.rejected, pair.label_prob) == (images[1], images[0], 0.75)
    assert dropped.reason == "no label"


def test_the_readme_names_every_verb() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for verb in (*VERBS, "doctor", "demo"):
        assert f"| `{verb}` |" in text
