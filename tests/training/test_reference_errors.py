"""The reference's errors, computed beforehand: each is that of its own draw of its own example, and computed once."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from diffusion_dpo.config import ConfigError
from diffusion_dpo.processes import Processes
from diffusion_dpo.training import reference
from diffusion_dpo.training.batches import Reader
from diffusion_dpo.training.errors import Batch, denoising_errors
from tests.training import test_batches, test_errors


class KnownModel(test_errors.KnownModel):
    """Also maps times to timesteps, and says how many images its reference was asked about."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        super().__init__()
        self.asked = 0

    def sample_timesteps(self, uniform: torch.Tensor, num_timesteps: int | None) -> torch.Tensor:
        return (1000 * uniform).long()

    def predict(self, noisy_latents: torch.Tensor, timesteps: torch.Tensor, conditioning: Any) -> torch.Tensor:
        self.asked += len(noisy_latents) if self._frozen else 0
        return super().predict(noisy_latents, timesteps, conditioning)


def reader_of(steps: int, *, num_draws: int = 2, num_shapes: int = 2, processes: Processes = Processes()) -> Reader:  # noqa: B008
    """Ten examples of two shapes, four a step, drawn again every `num_draws` epochs."""
    overrides = [
        f"max_steps={steps}",
        "global_batch_size=4",
        "per_device_batch_size=2",
        "prompt_dropout=0.3",
        "reference.type=cached",
        f"reference.num_draws={num_draws}",
    ]
    cache = test_batches.KnownCache(10, num_shapes=num_shapes)
    reader = test_batches.reader_of(10, *overrides, cache=cache, processes=processes)
    return Reader(reader.config, KnownModel(), reader.examples, reader.cache, reader.first_pairs, processes)  # type: ignore[arg-type]


def needed(reader: Reader) -> set[tuple[int, int]]:
    """The (draw, example) of all visits of a run."""
    visits = [visit for step in range(reader.config.max_steps) for visit in reader.visits(step)]
    return {(visit.epoch % reader.config.reference.num_draws, visit.index) for visit in visits}


def error_of(reader: Reader, draw: int, index: int) -> list[float]:
    batch: Batch = reader.draw([reference.Visit(index, draw)])
    model = KnownModel()
    found = denoising_errors(model, batch, reference=model.reference).reference  # type: ignore[arg-type]
    assert found is not None
    return found[0].tolist()


@pytest.mark.parametrize("cells_per_file", [3, 1024])
@pytest.mark.parametrize(("steps", "num_shapes"), [(1, 1), (4, 1), (30, 1), (30, 2)])
def test_every_draw_that_a_run_meets_has_its_own_errors_and_no_other_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cells_per_file: int, steps: int, num_shapes: int
):
    monkeypatch.setattr(reference, "CELLS_PER_FILE", cells_per_file)
    reader = reader_of(steps, num_shapes=num_shapes)
    cached = reference.build(tmp_path, reader, {"seed": 0})
    cells = needed(reader)
    assert {tuple(cell) for cell in np.argwhere(~np.isnan(cached.table[:, :, 0])).tolist()} == cells
    for draw, index in cells:
        assert cached.table[draw, index].tolist() == pytest.approx(error_of(reader, draw, index), rel=1e-5)
    assert reader.model.asked == 2 * len(cells)  # type: ignore[attr-defined]
    (folder,) = tmp_path.iterdir()
    assert len(list(folder.glob("errors-*"))) == -(-len(cells) // cells_per_file)
    visits = reader.visits(0)
    expected = [error_of(reader, visit.epoch % 2, visit.index) for visit in visits]
    assert torch.allclose(torch.from_numpy(cached.of([cached.draw_of(v) for v in visits])), torch.tensor(expected))


def test_what_is_known_is_not_asked_again_by_longer_and_shorter_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(reference, "CELLS_PER_FILE", 3)

    def asked(steps: int, **settings: Any) -> int:
        reader = reader_of(steps, num_shapes=1, **settings)
        reference.build(tmp_path, reader, {"seed": 0})
        return reader.model.asked // 2  # type: ignore[attr-defined]

    assert [asked(2), asked(2)] == [8, 0]
    assert asked(3) == 12 - 6  # the two files that were full are as they were
    assert [asked(2), asked(1), asked(3, num_draws=1)] == [0, 0, 0]  # though the files have more than these need
    (folder,) = tmp_path.iterdir()
    (folder / "errors-00001.safetensors").unlink()
    assert asked(3) == 3


def test_every_missing_file_is_made_by_one_process_and_read_by_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Two processes one after the other, the second of which waits for no one; then the first reads both shares."""
    monkeypatch.setattr(reference, "CELLS_PER_FILE", 3)
    found: list[Any] = []

    class Rank(Processes):
        def from_main(self, value: Any) -> Any:
            found.append(value)
            return found[0]

        def wait(self) -> None:
            if self.rank == 0:
                reference.build(tmp_path, second, {"seed": 0})

    first, second = (reader_of(4, num_shapes=1, processes=Rank(rank, 2)) for rank in (0, 1))
    cached = reference.build(tmp_path, first, {"seed": 0})
    alone = reference.build(tmp_path / "alone", reader_of(4, num_shapes=1), {"seed": 0})
    np.testing.assert_array_equal(cached.table, alone.table)
    assert [it.model.asked for it in (first, second)] == [2 * 9, 2 * 7]  # type: ignore[attr-defined]
    assert found == [[], []]  # what the main process found; the other does not look


def test_a_process_that_did_not_look_reads_what_was_there_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(reference, "CELLS_PER_FILE", 3)
    alone = reference.build(tmp_path, reader_of(4, num_shapes=1), {"seed": 0})
    files = sorted(tmp_path.rglob("errors-*"))
    files[1].unlink()

    class Second(Processes):
        def from_main(self, value: Any) -> Any:
            return [file for file in files if file != files[1]]

        def wait(self) -> None:
            reference.build(tmp_path, reader_of(4, num_shapes=1), {"seed": 0})

    cached = reference.build(tmp_path, reader_of(4, num_shapes=1, processes=Second(1, 2)), {"seed": 0})
    np.testing.assert_array_equal(cached.table, alone.table)


def test_it_is_said_what_is_computed_and_what_cannot_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    reference.build(tmp_path, reader_of(2, num_shapes=1), {"seed": 0})
    said = capsys.readouterr().out
    assert "reference: its errors on 8 draws, 2 an example at most, are computed into" in " ".join(said.split())
    reference.build(tmp_path, reader_of(2, num_shapes=1), {"seed": 0})
    assert capsys.readouterr().out == ""
    monkeypatch.setattr(reference, "_make", lambda path, cells, reader, advance: path.write_bytes(b"nothing"))
    with pytest.raises(ConfigError, match="was just written and cannot be read; run the same command again"):
        reference.build(tmp_path, reader_of(2, num_shapes=1), {"seed": 1})


def test_other_facts_have_a_folder_of_their_own(tmp_path: Path):
    for facts in ({"seed": 0}, {"seed": 1}, {"seed": 0, "precision": "bf16"}):
        reference.build(tmp_path, reader_of(1), facts)
    assert len(list(tmp_path.iterdir())) == 3


def test_a_draw_that_was_not_computed_is_never_taken_for_one():
    table = np.array([[[0.5, 0.25], [np.nan, np.nan]]], np.float32)
    cached = reference.CachedErrors(1, table)
    assert cached.of([reference.Visit(0, 0)]).tolist() == [[0.5, 0.25]]
    with pytest.raises(AssertionError, match="a draw that no step was expected to need"):
        cached.of([reference.Visit(0, 0), reference.Visit(1, 0)])
