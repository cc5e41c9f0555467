"""kill -9 while scoring and while pairing, again on the rerun: then the same files as of a run that nobody killed."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

from PIL import Image

from diffusion_dpo.data.images import pixel_hash
from diffusion_dpo.data.shards import CANDIDATES, encode_png, image_struct, read_rows, write_shard

ROOT = Path(__file__).parents[1]
PROGRAM = """
import os, signal, sys
from diffusion_dpo import cli, pair, score
from diffusion_dpo.data import shards
from diffusion_dpo.scorers.brightness import Brightness

judge = Brightness.score

def logged(self, batch):
    with open("judged.log", "a") as log:
        print(*map(id, batch), sep="\\n", file=log)
    return judge(self, batch)

Brightness.score = logged
left = int(sys.argv[1])
moment = sys.argv[2]
replace, writer = os.replace, shards.pq.ParquetWriter.write_table

def count(*_):
    global left
    left -= 1
    if left < 0:
        os.kill(os.getpid(), signal.SIGKILL)

def counted_replace(source, target):
    if str(target).endswith(".parquet"):
        replace(source, target)
        if moment == "after":
            count()
    else:
        replace(source, target)

def counted_write(self, table):
    writer(self, table)
    if moment == "within":
        count()

os.replace = counted_replace
shards.pq.ParquetWriter.write_table = counted_write
pair._PAIRS_PER_SHARD = 3
sys.exit(cli.main(sys.argv[3:]))
"""


def make_candidates(folder: Path) -> None:
    folder.mkdir()
    for number in range(4):
        rows = []
        for i in range(12 * number, 12 * number + 12):
            image = Image.new("RGB", (32, 32), (5 * i + 3, i, 0))
            row = {"uid": pixel_hash(image), "prompt_id": str(i // 6), "prompt": f"prompt {i // 6}", "index": i % 6}
            row |= {"seed": i, "image": image_struct(encode_png(image)), "references": [], "origin": ""}
            rows.append(row | {"settings_hash": "0"})
        write_shard(folder / f"images-{number:05d}.parquet", rows, CANDIDATES)


def run(folder: Path, arguments: list[str], *, kill_after: int = 10**6, moment: str = "") -> int:
    command = [sys.executable, "-c", PROGRAM, str(kill_after), moment or "never", *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, check=False).returncode


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_killed_twice_and_then_finished(tmp_path: Path) -> None:
    verbs = (
        ["score", "path=candidates", "scorers=[brightness]", "batch_size=5", "device=cpu"],
        ["pair", "path=candidates", "strategy=all_pairs", "max_pairs_per_prompt=4", "output_dir=pairs"],
    )
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
        make_candidates(tmp_path / name / "candidates")
    for verb in verbs:
        assert run(tmp_path / "whole", verb) == 0
        for kill_after, moment in ((1, "within"), (1, "after")):
            assert run(tmp_path / "killed", verb, kill_after=kill_after, moment=moment) == -signal.SIGKILL
        assert run(tmp_path / "killed", verb) == 0
    judged = {name: len((tmp_path / name / "judged.log").read_text().splitlines()) for name in ("whole", "killed")}
    assert judged == {"whole": 48, "killed": 48 + 12}, "each image once, but for the file that was lost half-written"
    for name in judged:
        (tmp_path / name / "judged.log").unlink()
    assert snapshot(tmp_path / "killed") == snapshot(tmp_path / "whole")
    keys = [row["key"] for row in read_rows(tmp_path / "killed" / "candidates", pattern="scores-*.parquet")]
    assert len(keys) == len(set(keys)) == 48
    assert json.loads((tmp_path / "killed" / "pairs" / "manifest.json").read_text())["num_pairs"] == 32
