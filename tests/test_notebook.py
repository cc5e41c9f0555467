"""The notebook runs from top to bottom, on the pocket model."""

import os
import re
import sys
from itertools import islice
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from diffusion_dpo.pocket.world import distinct_scenes

NOTEBOOK = Path(__file__).parent.parent / "notebooks" / "tune_sd15.ipynb"
POCKET = """
MODEL, PROMPTS, JUDGE = "pocket", "prompts.txt", "clip"
GUIDANCE, STEPS, BATCH = 1.5, 8, 16
NUM_IMAGES, TRAIN_STEPS = 4, 3
"""


@pytest.mark.slow
def test_the_notebook_runs_on_the_pocket_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    book = nbformat.read(NOTEBOOK, as_version=4)
    (settings,) = [cell for cell in book.cells if "parameters" in cell.metadata.get("tags", ())]
    names = set(re.findall(r"\b[A-Z_]+\b(?=[ ,=])", settings.source))
    assert names == set(re.findall(r"\b[A-Z_]+\b(?=[ ,=])", POCKET))
    settings.source = POCKET
    book.cells = [cell for cell in book.cells if "install" not in cell.metadata.get("tags", ())]
    captions = [scene.caption for scene in islice(distinct_scenes(0), 16)]
    (tmp_path / "prompts.txt").write_text("\n".join(captions), encoding="utf-8")
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(NOTEBOOK.parent.parent))
    NotebookClient(book, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    said = "".join(output.get("text", "") for cell in book.cells for output in cell.get("outputs", ()))
    assert "error:" not in said and "Traceback" not in said
    assert "clip_text trained_on" in said and "sharpness held_out" in said
    assert (tmp_path / "runs" / "compare" / "report.html").exists()
    assert (tmp_path / "runs" / "train" / "adapter" / "pytorch_lora_weights.safetensors").exists()
