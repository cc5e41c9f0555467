"""The demo, whole: what a newcomer runs first must end with a report that shows a real improvement."""

import json
from pathlib import Path

import pytest

from diffusion_dpo import demo
from diffusion_dpo.data.prompts import read_prompts
from diffusion_dpo.files import read_manifest
from diffusion_dpo.pocket.world import is_held_out, parse_caption
from diffusion_dpo.settings import DemoConfig


@pytest.mark.slow
def test_the_demo_improves_the_held_out_metric(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "my demo #1"
    report = demo.run(DemoConfig(output_dir=folder, seed=0))
    assert report == folder / "report.html"
    metrics = {result["name"]: result for result in json.loads((folder / "report.json").read_text())["results"]}
    assert metrics["clip_text"]["role"] == "trained_on"
    held_out = metrics["pocket_scene"]
    assert held_out["role"] == "held_out"
    assert held_out["mean_difference_interval"][0] > 0
    assert read_manifest(folder / "pairs")["labelled_by"] == ["clip_text"]
    for name, side in (("prompts.txt", False), ("held-out-prompts.txt", True)):
        scenes = [parse_caption(prompt.text) for prompt in read_prompts(folder / name)]
        assert all(scene is not None and is_held_out(scene) == side for scene in scenes)
    capsys.readouterr()
    demo.run(DemoConfig(output_dir=folder, seed=0))
    said = capsys.readouterr().out
    assert "candidates are there already" in said
    assert "trained to step" in said
