"""The bases and LoRAs that the tests of `export` share."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.exporting.loras import ATTENTION, CONVOLUTIONS, TEXT, Made, lora
from tests.fakes import make_stable_diffusion, make_stable_diffusion_xl


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    return {"sd": make_stable_diffusion(folder / "sd"), "xl": make_stable_diffusion_xl(folder / "xl")}


@pytest.fixture(scope="module")
def made(bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Made]:
    """A LoRA of a family: `plain` with rank 4 and alpha 16, or `all` kinds of layers, patterns, text encoders."""
    known: dict[tuple[str, str], Made] = {}

    def make(family: str, what: str) -> Made:
        if (family, what) not in known:
            folder = tmp_path_factory.mktemp("loras") / f"{family}-{what}"
            if what == "plain":
                configs = [lora(*ATTENTION)]
            elif what == "dora":
                configs = [lora(*ATTENTION, use_dora=True)]
            else:
                patterns = {
                    "rank_pattern": {"conv1": 2, "mid_block.*to_k": 3},
                    "alpha_pattern": {"to_q": 2, "conv1": 5},
                }
                configs = [
                    lora(*ATTENTION, *CONVOLUTIONS, "proj_in", "ff.net.0.proj", **patterns),
                    lora(*TEXT, r=2, lora_alpha=6),
                ]
            known[family, what] = Made(bases[family], folder, *configs)
        return known[family, what]

    return make
