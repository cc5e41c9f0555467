"""Every shipped config loads, is short, and opens with its command, its cost and what to expect."""

from pathlib import Path

import pytest

from diffusion_dpo.config import dump, load
from diffusion_dpo.settings import VERBS

ROOT = Path(__file__).parent.parent
LAUNCHERS = sorted((ROOT / "configs" / "accelerate").glob("*.yaml"))
PATHS = sorted(set((ROOT / "configs").rglob("*.yaml")) - set(LAUNCHERS))


def test_there_are_configs_for_every_verb_that_takes_a_file() -> None:
    assert {path.parent.name for path in PATHS} == set(VERBS) - {"inspect", "report"}


@pytest.mark.parametrize("path", PATHS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_config_loads_and_survives_a_round_trip(path: Path, tmp_path: Path) -> None:
    cls = VERBS[path.parent.name]
    config = load(cls, path)
    complete = tmp_path / "config.yaml"
    complete.write_text(dump(config))
    assert load(cls, complete) == config


def test_held_out_prompts_are_not_those_that_pairs_are_made_of() -> None:
    held_out, others = (
        (ROOT / "configs" / name).read_text().splitlines() for name in ("held_out_prompts.txt", "prompts.txt")
    )
    assert len(set(held_out)) == 24 and not set(held_out) & set(others)


@pytest.mark.parametrize("path", PATHS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_config_is_short_and_has_a_header(path: Path) -> None:
    lines = path.read_text().splitlines()
    assert len(lines) < 30
    assert lines[0].startswith(f"# diffusion-dpo {path.parent.name} {path.relative_to(ROOT).as_posix()}")
    assert any(line.startswith("# Cost: ") for line in lines)
    assert any(line.startswith("# Expect: ") for line in lines)
    assert max(map(len, lines)) <= 119


@pytest.mark.parametrize("path", LAUNCHERS, ids=lambda path: path.stem)
def test_accelerate_reads_its_configs_as_they_are_meant(path: Path) -> None:
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_multi_gpu_env

    command = path.read_text().splitlines()[0].removeprefix("# accelerate launch ").split()
    assert command[1] == path.relative_to(ROOT).as_posix() and any((ROOT / word).exists() for word in command[3:])
    command[1] = str(path)
    parsed, *_ = _validate_launch_command(launch_command_parser().parse_args(command))
    assert parsed.num_processes == 8 and parsed.multi_gpu is (path.stem == "ddp")
    environment = prepare_multi_gpu_env(parsed)
    assert environment.get("ACCELERATE_USE_FSDP") == ("true" if path.stem == "fsdp2" else None)
