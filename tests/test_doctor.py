"""The doctor: complete, honest about what it sees, and silent about who asks."""

import json
import sys
import time
from pathlib import Path

import pytest

from diffusion_dpo import doctor


def _findings(**changes: object) -> dict[str, object]:
    cpu = {"device": "cpu", "name": "x", "precision": ["fp32"]}
    return {"torch_error": None, "pocket_weights": True, "devices": [cpu], **changes}


def test_json_is_complete_and_has_no_home_folder(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert doctor.run(as_json=True) == 0
    text = capsys.readouterr().out
    found = json.loads(text)
    assert found["devices"][-1]["device"] == "cpu"
    assert found["versions"]["torch"]
    assert found["disk"]["here"]["free_gib"] > 0
    assert found["hub"].startswith("offline")
    assert "non-commercial" in found["extras"]["face"]["licence"]
    assert found["verdict"]
    assert str(Path.home()) not in text


def test_text_ends_with_the_verdict(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_hub", lambda: "reachable")
    doctor.run()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("diffusion-dpo")
    assert lines[-1] == doctor.examine()["verdict"]


def test_a_hub_that_never_answers_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    def hang(*_: object, **__: object) -> None:
        time.sleep(3)
        raise OSError("at last")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("urllib.request.urlopen", hang)
    monkeypatch.setattr(doctor, "HUB_TIMEOUT_SECONDS", 0.1)
    began = time.monotonic()
    assert doctor._hub().startswith("not reachable")
    assert time.monotonic() - began < 2


@pytest.mark.parametrize(
    ("memory_gib", "says"),
    [(4, "wants a GPU"), (8, "gradient_checkpointing"), (12, "wants a card"), (24, "full fine-tuning of")],
)
def test_the_verdict_follows_the_card(memory_gib: int, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert says in doctor._verdict(_findings(devices=[{"device": "cuda:0", "memory_gib": memory_gib}]))


def test_a_gpu_that_torch_cannot_use_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: "/usr/bin/nvidia-smi")
    assert "torch sees no GPU" in doctor._verdict(_findings())


def test_a_torchvision_of_another_torch_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "torchvision.py").write_text('raise RuntimeError("operator torchvision::nms does not exist")')
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "torchvision", raising=False)
    devices, error = doctor._devices()
    assert devices == [] and error == "torchvision cannot be imported: operator torchvision::nms does not exist"
    assert "torchvision::nms" in doctor._verdict(_findings(torch_error=error))


def test_missing_weights_and_a_broken_torch_are_named() -> None:
    assert "pocket" in doctor._verdict(_findings(pocket_weights=False))
    assert "no libtorch" in doctor._verdict(_findings(torch_error="no libtorch"))
