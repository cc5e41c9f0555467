"""A start on very many cached pairs costs what a start on a few does."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "scripts" / "bench_memory.py"


@pytest.mark.slow
def test_neither_memory_nor_the_time_to_start_grows_with_the_pairs():
    """A thousand bytes a pair, whether kept, mapped or passing, are too many, and so are 50 microseconds."""
    command = [sys.executable, str(SCRIPT), "--json", "--sizes", "1000", "200000"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    few, many = (json.loads(line) for line in done.stdout.splitlines())
    assert (few["pairs"], many["pairs"]) == (1000, 200000)
    assert many["peak_mb"] - few["peak_mb"] < 200
    assert many["anonymous_mb"] - few["anonymous_mb"] < 60
    assert many["seconds"] - few["seconds"] < 10
