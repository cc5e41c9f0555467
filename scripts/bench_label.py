"""What a vote costs `label`: by the number of pairs, with many raters at once, and beside idle connections.

    python scripts/bench_label.py            # about a minute on two cores

First CPU time of one vote (its questions, its progress and its line in the log), without HTTP. Then the real command
on 30,000 pairs: time until it listens, and how long a vote takes for 24 raters who all vote without a pause, with one
connection each; then for one rater while 2,000 connections are held open that send nothing, all of this machine's own.
"""

import argparse
import dataclasses
import json
import re
import resource
import secrets
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

from PIL import Image

from diffusion_dpo import label
from diffusion_dpo.config import dump, load
from diffusion_dpo.data.votes import ITEMS
from diffusion_dpo.label.items import Item
from diffusion_dpo.label.log import Log
from diffusion_dpo.label.study import Study
from diffusion_dpo.settings import LabelConfig

TOKEN = "a-token-of-the-benchmark"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", nargs="*", type=int, default=[300, 3_000, 30_000])
    parser.add_argument("--raters", type=int, default=24)
    parser.add_argument("--votes", type=int, default=50, help="by every rater")
    parser.add_argument("--idle", type=int, default=2_000, help="connections that say nothing")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for number in args.pairs:
            seconds = cpu_of_a_vote(root / f"{number}.jsonl", number)
            print(f"{number} pairs: {1000 * seconds:.3f} ms of CPU a vote", flush=True)
        began = time.perf_counter()
        config = make_study(root, max(args.pairs))
        print(f"{max(args.pairs)} pairs: the folder takes {time.perf_counter() - began:.1f} s to make", flush=True)
        began = time.perf_counter()
        server, port = start(config, root)
        try:
            print(f"listens after {time.perf_counter() - began:.1f} s", flush=True)
            vote_together(port, args.raters, args.votes)
            vote_beside_idle_ones(port, args.idle)
        finally:
            server.terminate()
            server.wait()


def cpu_of_a_vote(path: Path, pairs: int) -> float:
    """Return the CPU seconds of a vote with its questions and progress, the median of 9 times 20."""
    found = []
    with Log(path) as log:
        study = Study(LabelConfig(), [make_item(n, "", "") for n in range(pairs)], log)
        for part in range(10):
            began = time.process_time()
            for turn in range(20):
                tasks = study.tasks("r", 4)
                study.progress("r")
                study.vote("r", tasks[0].id, "left", key=f"key-{part}-{turn}", reason="", seconds=1.0)
            found.append((time.process_time() - began) / 20)
    return statistics.median(found[1:])


def make_item(number: int, first: str, second: str) -> Item:
    return Item(f"{number:032x}", f"prompt {number}", f"{number}", f"-{number}", first, second)


def make_study(root: Path, pairs: int) -> LabelConfig:
    """Make the folder of a labelling by the command itself, of one pair, and let its list name it again and again."""
    for name, light in (("chosen", 200), ("rejected", 80)):
        (root / "pairs" / name).mkdir(parents=True)
        Image.new("RGB", (64, 64), (light,) * 3).save(root / "pairs" / name / "one.png")
    (root / "pairs" / "chosen" / "one.txt").write_text("a prompt", encoding="utf-8")
    settings = ["data.type=two_folders", f"data.path={root / 'pairs'}", f"output_dir={root / 'label'}", "port=0"]
    config = load(LabelConfig, None, [*settings, f"token={TOKEN}"])
    label.export(config)
    path = config.output_dir / ITEMS
    (one,) = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    items = [make_item(number, one["first_image"], one["second_image"]) for number in range(pairs)]
    path.write_text("".join(json.dumps(dataclasses.asdict(item)) + "\n" for item in items), encoding="utf-8")
    return config


def start(config: LabelConfig, root: Path) -> tuple[subprocess.Popen[str], int]:
    path = root / "label.yaml"
    path.write_text(dump(config), encoding="utf-8")
    command = [sys.executable, "-m", "diffusion_dpo", "label", str(path)]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    for line in server.stdout:
        if found := re.match(r"open: http://[^/]+:(\d+)/", line):
            return server, int(found[1])
    raise SystemExit("label did not start")


class Rater:
    """Somebody at a page, with one connection."""

    def __init__(self, port: int, name: str) -> None:
        self.connection = HTTPConnection("127.0.0.1", port, timeout=60)
        cookies = f"token-{port}={TOKEN}; rater-{port}={name.encode().hex()}"
        self.headers = {"Cookie": cookies, "Origin": f"http://127.0.0.1:{port}", "X-Rater": name}
        self.tasks = self.ask("GET", "/next")["tasks"]

    def ask(self, method: str, path: str, body: Any = None) -> Any:
        data = None if body is None else json.dumps(body)
        self.connection.request(method, path, data, self.headers)
        answer = self.connection.getresponse()
        found = json.loads(answer.read())
        assert answer.status == 200, found
        return found

    def vote(self) -> float:
        """Return the seconds until a vote is acknowledged."""
        body = {"task": self.tasks[0]["task"], "answer": "left", "key": secrets.token_hex(16), "seconds": 1.0}
        began = time.perf_counter()
        self.tasks = self.ask("POST", "/vote", body)["tasks"]
        return time.perf_counter() - began


def vote_together(port: int, raters: int, votes: int) -> None:
    waits: list[float] = []
    people = [Rater(port, f"rater {number}") for number in range(raters)]
    threads = [threading.Thread(target=lambda it=it: waits.extend([it.vote() for _ in range(votes)])) for it in people]
    began = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    took = time.perf_counter() - began
    assert len(waits) == raters * votes
    print(f"{raters} raters at once, {len(waits)} votes, {len(waits) / took:.0f} a second: {told(waits)}", flush=True)


def vote_beside_idle_ones(port: int, amount: int) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, amount + 200)), hard))
    held = []
    try:
        for _ in range(amount):
            held.append(socket.create_connection(("127.0.0.1", port), timeout=10))
        rater = Rater(port, "rater of the end")
        waits = [rater.vote() for _ in range(50)]
        print(f"beside {amount} idle connections, {len(waits)} votes: {told(waits)}", flush=True)
    finally:
        for connection in held:
            connection.close()


def told(waits: list[float]) -> str:
    ordered = sorted(1000 * wait for wait in waits)
    return f"median {ordered[len(ordered) // 2]:.1f} ms, 95 % under {ordered[len(ordered) * 95 // 100]:.1f} ms"


if __name__ == "__main__":
    main()
