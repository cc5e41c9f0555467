"""What a model was trained on, and so which judges of a comparison are held out from it."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from diffusion_dpo.comparing import Compared
from diffusion_dpo.comparing.lineup import implicit_accuracy, line_up, training_facts
from diffusion_dpo.comparing.roles import roles_of
from diffusion_dpo.config import validate
from diffusion_dpo.data.pickapic import PickapicData
from diffusion_dpo.files import write_json
from diffusion_dpo.processes import Processes
from diffusion_dpo.settings import CompareConfig, ImageModel


def test_roles_come_from_the_training_run(tmp_path: Path) -> None:
    write_json(tmp_path / "manifest.json", {"made_by": "train", "labelled_by": ["clip"]})
    (tmp_path / "adapter").mkdir()
    weights = tmp_path / "adapter" / "pytorch_lora_weights.safetensors"
    weights.write_bytes(b"")
    for path in (tmp_path, tmp_path / "adapter", weights):
        run_dir, facts = training_facts(path)
        assert run_dir == tmp_path and facts["labelled_by"] == ["clip"]
    assert training_facts(tmp_path / "adapter" / "deeper" / "still") == (None, {})


def test_a_role_is_that_of_one_model_and_of_its_training_data(tmp_path: Path) -> None:
    rows = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"caption": ["a"]}), rows)
    settings = validate(CompareConfig, {"scorers": ["clip", "pickscore"], "models": {"a": {}}}, where="the test")

    def compared(name: str, labelled_by: tuple[str, ...], *lineage: str) -> Compared:
        return Compared(name, settings.baseline, "", labelled_by=labelled_by, lineage=frozenset(lineage))

    lineup = [
        compared("baseline", ()),
        compared("by clip", ("clip_text",)),
        compared("by light", ("brightness",)),
        compared("by people", (), *PickapicData(type="pickapic", path=rows).lineage),
    ]
    roles = roles_of(settings, lineup)
    assert "baseline" not in roles
    assert roles["by clip"]["clip_text"] == "trained_on" and roles["by clip"]["nearest_clip"] == "related"
    assert roles["by clip"]["pickscore"] == "held_out"  # another backbone than the pocket CLIP
    assert roles["by light"]["clip_text"] == "held_out" and roles["by light"]["brightness"] == "trained_on"
    assert roles["by people"]["pickscore"] == "related" and roles["by people"]["clip_text"] == "held_out"


@pytest.mark.parametrize(
    "manifest,labelled_by",
    [
        ({"labelled_by": ["human"]}, ("human",)),
        ({"labelled_by": ["clip_text"]}, ("clip_text",)),
        ({"labelled_by": [], "lineage": ["data: Pick-a-Pic"]}, None),
        ({"labelled_by": []}, None),
    ],
)
def test_what_labelled_is_known_or_said_to_be_unknown(
    tmp_path: Path, manifest: dict[str, object], labelled_by: tuple[str, ...] | None
) -> None:
    folder = tmp_path / "run"
    (folder / "adapter").mkdir(parents=True)
    (folder / "adapter" / "pytorch_lora_weights.safetensors").write_bytes(b"")
    write_json(folder / "manifest.json", {"made_by": "train", **manifest})
    changes = {"models": {"tuned": {"adapter_path": str(folder)}}}
    for trained_on, expected in ((None, labelled_by), ([], ())):
        settings = validate(CompareConfig, {**changes, "trained_on": trained_on}, where="the test")
        assert line_up(settings, Processes.join("cpu"))[1].labelled_by == expected


def test_the_accuracy_of_training_is_that_of_its_checkpoint_and_strength(tmp_path: Path) -> None:
    rows = [{"step": 10, "eval/accuracy": 0.6, "eval/accuracy/se": 0.1}, {"step": 20, "eval/accuracy": 0.7}]
    lines = [*map(json.dumps, rows), "[1]", '{"step": 30, "eval/acc']
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines), encoding="utf-8")
    model = ImageModel(adapter_path=tmp_path)
    assert implicit_accuracy(Compared("last", model, "", trained_by=tmp_path)) == (20, 0.7, None)
    assert implicit_accuracy(Compared("earlier", model, "", trained_by=tmp_path, step=19)) == (10, 0.6, 0.1)
    weaker = model.model_copy(update={"adapter_scale": 0.5})
    assert implicit_accuracy(Compared("weaker", weaker, "", trained_by=tmp_path)) is None


def test_our_own_pairs_in_the_columns_of_pickapic_say_what_labelled_them(tmp_path: Path) -> None:
    """As `export format=pickapic` leaves them."""
    pq.write_table(pa.table({"caption": ["a"]}), tmp_path / "pairs-00000.parquet")
    write_json(tmp_path / "manifest.json", {"made_by": "export", "labelled_by": ["clip_text"]})
    source = PickapicData(type="pickapic", path=tmp_path)
    assert source.labelled_by() == ("clip_text",) and not source.lineage
