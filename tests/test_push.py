"""`push`: huggingface_hub's own client against a stand-in hub, over HTTP; what is sent, and what never is."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file

from diffusion_dpo import card
from diffusion_dpo.card.public import public_data, public_settings, scrub
from diffusion_dpo.cli import main
from diffusion_dpo.config import dump, load
from diffusion_dpo.files import write_json
from diffusion_dpo.settings import TrainConfig
from tests.comparisons import made_report
from tests.hub import TOKEN, Hub, hub_server

FACTS = {"num_pairs": 10, "num_held_out": 2, "drops": {}, "labelled_by": ["pickscore"], "steps": 200}


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A finished run, with everything in it that must not leave it."""
    folder = tmp_path / "secret-home" / "my-run"
    for name in ("adapter", "checkpoints/step-00000200", "cache", "previews/step-00000000", "previews/step-00000200"):
        (folder / name).mkdir(parents=True)
    (folder / "adapter" / "pytorch_lora_weights.safetensors").write_bytes(b"weights" * 100)
    (folder / "checkpoints" / "step-00000200" / "optimizer.safetensors").write_bytes(b"optimizer")
    (folder / "cache" / "latents.safetensors").write_bytes(b"training data")
    (folder / ".env").write_text(TOKEN)
    for step, colour in (("00000000", "black"), ("00000200", "red")):
        Image.new("RGB", (8, 8), colour).save(folder / "previews" / f"step-{step}" / "00.png")
    settings = [
        f"output_dir={folder}",
        f"data.path={tmp_path}/secret-home/pairs",
        f"cache_dir={tmp_path}/secret-home/c",
    ]
    config = load(TrainConfig, None, [*settings, f"model.pretrained={tmp_path}/secret-home/base", "loss.type=dmpo"])
    (folder / "config.yaml").write_text(dump(config))
    write_json(folder / "manifest.json", {"made_by": "train", "complete": True, "identity": {}, **FACTS})
    card.write_card(config, folder / "adapter", FACTS)
    return folder


@pytest.fixture
def hub() -> Iterator[Hub]:
    with hub_server() as server:
        yield server


def push(run_dir: Path, *settings: str, token: str | None = TOKEN) -> tuple[int, str]:
    """In a process of its own, which has no word of this one's being offline."""
    environment = {key: value for key, value in os.environ.items() if key not in ("HF_HUB_OFFLINE", "HF_TOKEN")}
    environment |= {"HF_HUB_DISABLE_XET": "1", "HF_HOME": str(run_dir.parent / "hf"), "HF_HUB_DISABLE_TELEMETRY": "1"}
    if token is not None:
        environment["HF_TOKEN"] = token
    command = [sys.executable, "-m", "diffusion_dpo", "push", f"path={run_dir}", *settings]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


SENT = {
    "README.md",
    "images/00.png",
    "mine.safetensors",
    "pytorch_lora_weights.safetensors",
    "report/plots/metrics.png",
    "report/report.md",
    "training_config.yaml",
}


def test_what_arrives_is_the_result_and_nothing_else(run_dir: Path, hub: Hub) -> None:
    (run_dir / "kohya").mkdir()
    kohya = run_dir / "kohya" / "mine.safetensors"
    save_file({f"lora_unet_x.lora_{way}.weight": torch.ones(2, 2) for way in ("down", "up")}, kohya)
    sent = kohya.read_bytes()
    report = run_dir.parent / "compare"
    report.mkdir()
    (report / "report.md").write_text("# numbers")
    (report / "plots").mkdir()
    (report / "plots" / "metrics.png").write_bytes(b"a plot")
    (report / "plots" / "somebody.png").write_bytes(b"a private photograph")
    (report / "report.json").write_text(made_report(run_dir).model_dump_json())
    settings = ["repo_id=me/mine", f"endpoint={hub.url}", f"report_path={report}", "dry_run=false"]
    code, text = push(run_dir, *settings)
    assert code == 0 and f"sent: {hub.url}/me/mine" in text, text
    files = hub.files["me/mine"]
    assert files.keys() == SENT and hub.private == {"me/mine": True}
    assert files["pytorch_lora_weights.safetensors"] == b"weights" * 100 and files["mine.safetensors"] == sent
    assert files["images/00.png"] == (run_dir / "previews" / "step-00000200" / "00.png").read_bytes()
    everything = b"".join(files.values()).decode(errors="replace")
    assert "secret-home" not in everything and str(run_dir.parent.parent) not in everything
    assert TOKEN not in text and TOKEN not in everything
    assert "load_lora_weights('me/mine')" in files["README.md"].decode() and "100.0%" in files["README.md"].decode()
    assert yaml.safe_load(files["training_config.yaml"])["model"]["pretrained"] == "base"
    code, text = push(run_dir, *settings)
    assert code == 0, text  # the repository is there already


def test_a_dry_run_lists_everything_and_calls_nobody(
    run_dir: Path, hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["push", f"path={run_dir}", "repo_id=me/mine", f"endpoint={hub.url}"]) == 0
    out = capsys.readouterr().out
    assert "700 B  pytorch_lora_weights.safetensors" in out and "optimizer" not in out and "latents" not in out
    send = f"diffusion-dpo push path={run_dir} repo_id=me/mine endpoint={hub.url} dry_run=false"
    assert f"nothing was sent. To send it: {send}" in out
    assert hub.calls == []


def test_without_a_token_it_says_how_to_get_one(run_dir: Path, hub: Hub) -> None:
    code, text = push(run_dir, "repo_id=me/mine", f"endpoint={hub.url}", "dry_run=false", token=None)
    assert code == 2 and "there is no token for the hub; run `hf auth login`" in text and hub.calls == []


@pytest.mark.parametrize(("address", "status"), [("/api/repos/create", 403), ("/commit/", 400), ("/large/", 403)])
def test_a_refusal_is_one_sentence_without_the_token(run_dir: Path, hub: Hub, address: str, status: int) -> None:
    hub.fails[address] = status
    code, text = push(run_dir, "repo_id=me/mine", f"endpoint={hub.url}", "dry_run=false")
    assert code == 2 and "error: the hub did not take it" in text and "Traceback" not in text, text
    assert TOKEN not in text and "***" in text
    assert not hub.files.get("me/mine")


def test_an_edited_card_is_sent_as_it_is(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run_dir / "README.md").write_text("my own words")
    assert main(["push", f"path={run_dir}"]) == 0
    out = capsys.readouterr().out
    assert "was edited, or written by another version" in out and "12 B  README.md" in out
    for place in (run_dir.parent / "base", run_dir, run_dir.parent / "pairs"):
        (run_dir / "README.md").write_text(f"made from {place}")
        assert main(["push", f"path={run_dir}"]) == 2
        assert f"names {place}, a folder of this machine" in capsys.readouterr().err


def test_a_file_that_is_not_the_lora_in_kohyas_names_is_not_sent(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (run_dir / "kohya").mkdir()
    in_other_names = ("unet.x.lora_A.weight", "unet.x.lora_B.weight")
    for names in (in_other_names, ("model.diffusion_model.x",)):  # and a whole checkpoint
        save_file({name: torch.ones(2, 2) for name in names}, run_dir / "kohya" / "pytorch_lora_weights.safetensors")
        assert main(["push", f"path={run_dir}"]) == 2
        assert "is no LoRA in kohya's names" in capsys.readouterr().err
    (run_dir / "kohya" / "pytorch_lora_weights.safetensors").unlink()
    save_file(
        {f"lora_unet_x.lora_{way}.weight": torch.ones(2, 2) for way in ("down", "up")},
        run_dir / "kohya" / "mine.safetensors",
    )
    identity = {"weights": "those of before it was trained further", "adapter_scale": 1.0}
    write_json(run_dir / "kohya" / "manifest.json", {"made_by": "export", "complete": True, "identity": identity})
    assert main(["push", f"path={run_dir}"]) == 2
    assert "was exported from other weights" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (["repo_id=mine"], "has no owner; write owner/mine"),
        (["repo_id='a b/../c'"], "is no name of a repository"),
        (["dry_run=false"], "repo_id is missing"),
        (["kohya_path=nowhere"], "should be or hold one .safetensors file"),
        (["report_path=nowhere"], "is not the report.json of a comparison"),
        (["path=nowhere"], "is no run folder of train"),
    ],
)
def test_what_cannot_be_sent_is_one_sentence(
    run_dir: Path, settings: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = [] if settings[0].startswith("path=") else [f"path={run_dir}"]
    assert main(["push", *run, *settings]) == 2
    assert says in capsys.readouterr().err


def test_an_unfinished_run_is_not_sent(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_json(run_dir / "manifest.json", {"made_by": "train", "complete": False, "identity": {}})
    assert main(["push", f"path={run_dir}"]) == 2
    assert "is not finished" in capsys.readouterr().err


def test_settings_keep_no_path_and_no_secret() -> None:
    before = {
        "pretrained": "/home/me/base",
        "hub": "owner/name",
        "cache_dir": "~/cache",
        "api_key": "x",
        "headers": {"Authorization": "Bearer x", "X-API-KEY": "x"},
        "output_dir": "clients/acme",
        "adapter_path": "x/y",
        "base": "models/private/base",
        "data": {"type": "hub", "path": "owner/name"},
        "pairs": {"type": "pairs", "path": "clients/acme"},
        "prompts": ["a/b", "cat and/or dog", "/a"],
        "negative_prompt": "blurry/ugly",
        "scorers": [{"type": "http", "url": "https://me:pw@host/x", "path": "/a/b.txt", "num": 3}],
    }
    after = {
        "pretrained": "base",
        "hub": "owner/name",
        "cache_dir": "cache",
        "headers": {},
        "output_dir": "acme",
        "adapter_path": "y",
        "base": "base",
        "data": {"type": "hub", "path": "owner/name"},
        "pairs": {"type": "pairs", "path": "acme"},
        "prompts": ["a/b", "cat and/or dog", "/a"],
        "negative_prompt": "blurry/ugly",
        "scorers": [{"type": "http", "url": "https://...", "path": "b.txt", "num": 3}],
    }
    assert scrub(before) == after


@pytest.mark.parametrize(
    ("path", "exists", "name"),
    [
        ("/home/me/clients/acme", False, "acme"),
        ("clients/acme", True, "acme"),
        ("./acme", False, "acme"),
        ("owner/name", False, "owner/name"),
    ],
)
def test_the_data_has_its_name_on_the_hub_or_the_last_of_its_path(
    run_dir: Path, path: str, exists: bool, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether it is a folder is seen from where training ran, and holds wherever it is pushed from."""
    monkeypatch.chdir(tmp_path)
    if exists:
        Path(path).mkdir(parents=True)
    config = load(TrainConfig, None, ["data.type=hub", f"data.path={path}", f"output_dir={run_dir}"])
    facts = FACTS | {"data": public_data(config, {})}
    monkeypatch.chdir("/")
    texts = [card.local_card(config, "adapter", facts), yaml.safe_dump(public_settings(config, facts))]
    assert f"of type hub ({name})" in texts[0].replace("\\", "")
    assert all(path == name or path not in text for text in texts)
