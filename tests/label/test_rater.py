"""A rater who votes on 500 pairs through the real server, which is killed again and again."""

import http.client
import http.cookiejar
import json
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from diffusion_dpo.config import dump
from diffusion_dpo.data import PreferencePair
from diffusion_dpo.data.candidates import find_units
from diffusion_dpo.data.pairs import PairsData
from tests.label.studies import TOKEN, make_config, write_candidates

NUM_PAIRS = 500


class Server:
    """`diffusion-dpo label` in a process of its own."""

    def __init__(self, config_path: Path) -> None:
        self.config_path = config_path
        self.address = ""

    def start(self) -> None:
        command = [sys.executable, "-m", "diffusion_dpo", "label", str(self.config_path)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        assert self.process.stdout is not None
        said = []
        for line in self.process.stdout:
            said.append(line)
            if found := re.match(r"open: (http://[^/]+)/", line):
                self.address = found[1]
                return
        raise AssertionError("".join(said))


class Rater:
    """Somebody at the page: sends a vote until it is acknowledged, whoever dies meanwhile."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.opener = urllib.request.build_opener(urllib.request.HTTPCookieProcessor(http.cookiejar.CookieJar()))

    def arrive(self) -> None:
        self.opener.open(f"{self.server.address}/?token={TOKEN}").read()
        self.ask("/name", {"name": "simulated"})

    def ask(self, path: str, body: dict[str, Any] | None = None) -> Any:
        return json.loads(self.fetch(path, None if body is None else json.dumps(body).encode()))

    def see(self, name: str) -> bytes:
        return self.fetch(f"/image/{name}")

    def fetch(self, path: str, data: bytes | None = None) -> bytes:
        headers = {"Origin": self.server.address, "X-Rater": "simulated"}
        request = urllib.request.Request(self.server.address + path, data=data, headers=headers)
        deadline = time.monotonic() + 60
        while True:
            try:
                return bytes(self.opener.open(request, timeout=10).read())
            except urllib.error.HTTPError:
                raise
            except (OSError, http.client.HTTPException):
                assert time.monotonic() < deadline
                if self.server.process.poll() is not None:
                    self.server.start()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.slow
def test_a_rater_of_500_pairs_outlives_a_server_that_is_killed_again_and_again(tmp_path: Path) -> None:
    """What is exported in the end is what was chosen, pair by pair; undone votes are not in it."""
    prompts = [f"prompt number {i}" for i in range(NUM_PAIRS)]
    candidates = write_candidates(tmp_path / "candidates", prompts)
    shown = {unit_image.data: unit_image.uid for unit in find_units(candidates) for unit_image in unit.read()}
    path = tmp_path / "label.yaml"
    path.write_text(dump(make_config(tmp_path, f"port={free_port()}", "repeat_share=0.05")))
    server, rng = Server(path), random.Random(0)
    server.start()
    rater = Rater(server)
    rater.arrive()
    expected: dict[str, tuple[str, str] | None] = {}
    seen: set[str] = set()
    kills, number = 0, 0
    tasks = rater.ask("/next")["tasks"]
    try:
        while tasks:
            task = tasks[0]
            is_repeat = task["prompt"] in seen
            answer = rng.choices(["left", "right", "tie", "both_bad", "skip"], [45, 45, 4, 3, 3])[0]
            vote = {"task": task["task"], "answer": answer, "reason": "other", "seconds": 1.0}
            vote["key"] = f"vote-{number:06d}"
            number += 1
            if rng.random() < 0.012 and kills < 6:  # before, after, or while it is written
                kills += 1
                threading.Timer(0.01 * rng.random(), server.process.kill).start()
            state = rater.ask("/vote", vote)
            if not is_repeat:
                left, right = (shown[rater.see(name)] for name in task["images"])
                sides = {"left": (left, right), "right": (right, left)}
                expected[task["prompt"]] = sides.get(answer)
                seen.add(task["prompt"])
                if rng.random() < 0.03:
                    if rng.random() < 0.2 and kills < 6:
                        kills += 1
                        threading.Timer(0.01 * rng.random(), server.process.kill).start()
                    state = rater.ask("/undo", {"key": f"undo-{number:06d}"})
                    assert state["undone"] == task
                    seen.remove(task["prompt"])
                    del expected[task["prompt"]]
            tasks = state["tasks"]
        server.process.send_signal(signal.SIGTERM)
        output, _ = server.process.communicate(timeout=30)
        assert server.process.returncode == 143 and "next: diffusion-dpo train" in output
    finally:
        if server.process.poll() is None:
            server.process.kill()
    assert kills >= 3 and len(expected) == NUM_PAIRS
    pairs = list(PairsData(path=tmp_path / "label" / "pairs", type="pairs").read())
    assert all(isinstance(pair, PreferencePair) for pair in pairs)
    made = {pair.prompt: (pair.chosen_uid, pair.rejected_uid) for pair in pairs if isinstance(pair, PreferencePair)}
    assert made == {prompt: sides for prompt, sides in expected.items() if sides is not None}
