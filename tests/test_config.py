"""Settings: reading, overriding, refusing; and the help that is made of them."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from pydantic import Field

from diffusion_dpo import other_names
from diffusion_dpo.cli_help import describe_settings
from diffusion_dpo.config import Config, ConfigError, Plugin, command, dump, load, plugin, refuse_lost
from diffusion_dpo.config_help import settings
from diffusion_dpo.settings import VERBS, DemoConfig, PairConfig, ScoreConfig, TrainConfig


def write(folder: Path, text: str) -> Path:
    path = folder / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def problem(cls: type[Config], *overrides: str, path: Path | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        load(cls, path, overrides)
    return str(caught.value)


# --- reading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", [*VERBS.values(), DemoConfig], ids=lambda cls: cls.__name__)
def test_defaults_survive_a_round_trip(cls: type[Config], tmp_path: Path) -> None:
    config = load(cls)
    assert load(cls, write(tmp_path, dump(config))) == config


def test_a_changed_config_survives_a_round_trip(tmp_path: Path) -> None:
    changes = ("learning_rate=1e-8", "model.lora=null", "data.type=pickapic", "data.path=x/y z", "loss.beta=.5")
    config = load(TrainConfig, None, [*changes, 'preview.prompts=["yes: no", "1e3", "2026-11-23"]'])
    assert load(TrainConfig, write(tmp_path, dump(config))) == config


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-8", 1e-8),
        ("1E3", 1000.0),
        ("-.5", -0.5),
        ("1_000", 1000),
        ("0", 0),
        ("true", True),
        ("on", "on"),
        ("no", "no"),
        ("1:30", "1:30"),
        ("010", "010"),
        ("2026-11-23", "2026-11-23"),
        ("null", None),
        ("a cat, sitting", "a cat, sitting"),
    ],
)
def test_yaml_values_are_what_people_mean(text: str, value: Any, tmp_path: Path) -> None:
    class Anything(Config):
        x: Any

    for found in (load(Anything, None, [f"x={text}"]).x, load(Anything, write(tmp_path, f"x: {text}")).x):
        assert found == value
        assert type(found) is type(value)


def test_overrides_win_over_the_file_and_the_file_over_defaults(tmp_path: Path) -> None:
    path = write(tmp_path, "seed: 1\nmax_steps: 7\nloss: {beta: 30}")
    config = load(TrainConfig, path, ["seed=2"])
    assert (config.seed, config.max_steps, config.loss.beta, config.global_batch_size) == (2, 7, 30, 16)


def test_an_empty_file_means_the_defaults(tmp_path: Path) -> None:
    assert load(TrainConfig, write(tmp_path, "# nothing\n")) == TrainConfig()


def test_configs_are_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        TrainConfig().seed = 3


# --- plug-ins --------------------------------------------------------------------------------------------------------


def test_a_block_without_a_type_is_of_the_default_type(tmp_path: Path) -> None:
    config = load(TrainConfig, write(tmp_path, "model: {pretrained: here}"), ["loss.beta=7"])
    assert (config.model.type, config.model.pretrained) == ("stable_diffusion", "here")
    assert (config.loss.type, config.loss.beta) == ("dpo", 7)


@pytest.mark.parametrize("order", [1, -1])
def test_a_new_type_replaces_the_whole_block_whatever_the_order(order: int, tmp_path: Path) -> None:
    path = write(tmp_path, "data: {type: hub, path: owner/name, max_rows: 5}")
    config = load(TrainConfig, path, ["data.type=pickapic", "data.path=mine"][::order])
    assert config.data.model_dump() == {"type": "pickapic", "path": Path("mine"), "split": None, "ties": "drop"}


@pytest.mark.parametrize("text", ["data: {path: mine}", "data: {type: pairs, path: mine}"])
def test_naming_the_type_that_it_has_keeps_the_block(text: str, tmp_path: Path) -> None:
    assert load(TrainConfig, write(tmp_path, text), ["data.type=pairs"]).data.path == Path("mine")


class Outside(Plugin):
    """A plug-in from outside the package."""

    strength: float = Field(1.0, gt=0)
    """How much."""


class Holder(Config):
    """Holds a plug-in."""

    scorers: list[plugin("scorers")] = []  # type: ignore[valid-type]
    """Some."""


def test_a_plug_in_from_outside_is_an_import_string(tmp_path: Path) -> None:
    block = f"{{type: '{__name__}:Outside', strength: 2}}"
    config = load(Holder, None, [f"scorers=[{block}]"])
    assert isinstance(config.scorers[0], Outside)
    assert load(Holder, write(tmp_path, dump(config))) == config
    assert "scorers.0.strenght: there is no such setting. Did you mean scorers.0.strength?" in problem(
        Holder, f"scorers=[{block.replace('strength', 'strenght')}]"
    )


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("clpi", "Did you mean 'clip'?"),
        ("no_such_module:Thing", "cannot be imported"),
        ("diffusion_dpo.config:NoSuchClass", "has no class 'NoSuchClass'"),
        ("diffusion_dpo.settings:Sampling", "Sampling is not a Plugin"),
    ],
)
def test_a_type_that_is_none_is_refused(name: str, says: str) -> None:
    assert says in problem(Holder, f"scorers=['{name}']")


@pytest.mark.parametrize(
    "source", ["class Judge(:", "import nothing_of_this_name", "from os import no_such", "x = y", "''.no()", "len(1)"]
)
def test_a_module_that_fails_on_import_is_named(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "failing_judge.py").write_text(source, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert "type 'failing_judge:Judge' cannot be imported: " in problem(Holder, "scorers=['failing_judge:Judge']")


def test_a_tilde_is_the_home_folder_where_a_path_is_meant(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    config = load(
        TrainConfig, None, ["output_dir=~/out", "data.path=~/pairs", "model.pretrained=~/sd", "cache_dir='~'"]
    )
    assert (config.output_dir, config.cache_dir) == (tmp_path / "out", tmp_path)
    assert (config.data.path, config.model.pretrained) == (tmp_path / "pairs", str(tmp_path / "sd"))
    assert load(TrainConfig, None, ["model.revision=~/x"]).model.revision == "~/x"
    blocks = "{type: lpips, trunk_path: ~/a}, "
    blocks += "{type: aesthetic, head: ~/b, encoder: ~/c}, {type: pickscore, processor: ~/d}"
    lpips, aesthetic, pickscore = load(ScoreConfig, None, ["path=~/x", f"scorers=[{blocks}]"]).scorers
    found = (lpips.trunk_path, aesthetic.head, aesthetic.encoder, pickscore.processor)
    assert [str(path) for path in found] == [str(tmp_path / name) for name in "abcd"]
    assert load(TrainConfig, write(tmp_path, dump(config))) == config


PATHS = ("output_dir", "cache_dir", "data.path", "model.pretrained", "model.adapter_path")


def test_what_is_no_path_may_be_an_address_and_a_drive_is_none() -> None:
    [scorer] = load(
        ScoreConfig, None, ["scorers=[{type: http, gives: [{name: a}], version: 1, url: 'http://x.org/y'}]"]
    ).scorers
    assert scorer.url == "http://x.org/y"
    assert str(load(ScoreConfig, None, ["path=C:/images"]).path) == "C:/images"
    assert load(TrainConfig, None, ["model.pretrained=owner/name"]).model.pretrained == "owner/name"


# --- refusing --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("sed=1", "sed: there is no such setting. Did you mean seed?"),
        ("train_batch_size=2", "train_batch_size: there is no such setting: it is `per_device_batch_size`"),
        ("snr_gamma=5", "it is `weighting.min_snr_gamma`, beside `weighting.timesteps`=min_snr"),
        ("beta_dpo=5000", "it is `loss.beta`"),
        ("lr_scheduler=cosine", "`warmup_steps` steps and is then constant; there is no other schedule"),
        ("noise_offset=0.1", "noise_offset: there is no such setting: the noise is plain"),
        ("gradient_accumulation_steps=4", "`global_batch_size` / (`per_device_batch_size` x processes)"),
        ("model.rank=4", "model.rank: there is no such setting: it is `model.lora.rank`"),
        ("model.lora.network_dim=4", "it is `model.lora.rank`"),
        ("mixed_precision=no", "(got 'no'); it is fp32 here"),
        ("beta=1", "beta: there is no such setting. Did you mean loss.beta?"),
        ("loss.betta=1", "loss.betta: there is no such setting. Did you mean loss.beta?"),
        ("model.lora.rnk=4", "model.lora.rnk: there is no such setting. Did you mean model.lora.rank?"),
        ("preview.sampling.guidance=1", "Did you mean preview.sampling.guidance_scale?"),
        ("seed=x", "seed: Input should be a valid integer"),
        ("loss.beta=-1", "loss.beta: Input should be greater than 0 (got -1)"),
        ("mixed_precision=fp17", "(got 'fp17')"),
        ("learning-rate=1", "is not a setting: write key=value"),
        ("seed", "is not a setting: write key=value"),
        ("seed=[1", "is not valid YAML"),
        ("data.type=pickapic", "data.path: is required"),
        *((f"{key}=s3://bucket/x", f"{key}: an address such as s3:// or file:// is no path") for key in PATHS),
        ("data.path=s3:/bucket", "data.path: an address such as s3://"),
    ],
)
def test_a_wrong_override_is_answered_in_one_sentence(override: str, says: str) -> None:
    assert says in problem(TrainConfig, override)


@pytest.mark.parametrize("name", other_names.ANSWERS)
def test_an_answer_to_another_trainers_setting_names_what_exists(name: str) -> None:
    known = {re.sub(r"\[\w+\]", "", setting.key) for setting in settings(TrainConfig)}
    assert name not in known
    text = other_names.ANSWERS[name]
    assert {*other_names.named_in(text)} <= {*known} and other_names.answer(name.upper(), known) == text


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["seed=1", "max_steps=2", "seed=2"], "seed is set twice on the command line"),
        (["loss.beta=1", "loss.beta=1"], "loss.beta is set twice"),
        (["loss.beta=1", "loss=ipo"], "loss is set after loss.beta, which it would undo; give loss first"),
    ],
)
def test_an_override_that_would_undo_an_earlier_one_is_refused(overrides: list[str], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        refuse_lost(overrides)
    refuse_lost(["loss=ipo", "loss.beta=1", "max_steps=2"])


def test_every_problem_is_named_at_once() -> None:
    assert problem(TrainConfig, "sed=1", "loss.beta=-1", "max_steps=0").startswith("3 problems in the command line:")


@pytest.mark.parametrize(("size", "per_device", "nearest"), [(10, 4, "8 and 12"), (3, 4, "4 and 4")])
def test_batch_arithmetic_names_its_numbers(size: int, per_device: int, nearest: str) -> None:
    says = problem(TrainConfig, f"global_batch_size={size}", f"per_device_batch_size={per_device}")
    assert f"global_batch_size ({size})" in says
    assert nearest in says


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("seed: 1\nseed: 2", "seed is set twice"),
        ("loss.beta: 3", "in YAML, blocks are nested: `loss: {beta: ...}`"),
        ("- 1", "not a list"),
        ("a: [", "is not valid YAML"),
        ("just words", "not a str"),
    ],
)
def test_a_wrong_file_is_named_with_what_is_wrong(text: str, says: str, tmp_path: Path) -> None:
    message = problem(TrainConfig, path=write(tmp_path, text))
    assert says in message
    assert "run.yaml" in message


def test_a_missing_file_has_a_near_one(tmp_path: Path) -> None:
    write(tmp_path, "")
    assert "Did you mean run.yaml?" in problem(TrainConfig, path=tmp_path / "runn.yaml")


def test_a_file_that_is_not_text_or_a_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_bytes(b"\xff\xfe\x00")
    assert "cannot read" in problem(TrainConfig, path=tmp_path / "run.yaml")
    assert "cannot read" in problem(TrainConfig, path=tmp_path)


# --- help ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", [*VERBS.values(), DemoConfig], ids=lambda cls: cls.__name__)
def test_every_setting_has_a_type_and_a_meaning(cls: type[Config]) -> None:
    for setting in settings(cls):
        assert setting.type, setting.key
        assert setting.help.endswith((".", "?")), setting.key


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("cls", [*VERBS.values(), DemoConfig], ids=lambda cls: cls.__name__)
def test_help_fits_and_is_complete(cls: type[Config], width: int) -> None:
    text = describe_settings(cls, width=width)
    assert max(map(len, text.splitlines())) <= width
    for name in cls.model_fields:
        assert f"{name}" in text
    if cls is TrainConfig:
        assert "model.lora.rank=null" in text
        assert "with data.type=pickapic" in text
        assert "preview.sampling.batch_size=4" in text  # the block's own default, not that of Sampling
        assert "[number, > 0]" in text
    if cls is PairConfig:
        assert "[drop | lose]" in text
        assert "strategy.then=best_worst" in text, "a strategy within a strategy is named, and not opened"


VALUES = [
    "runs #2",
    "1e3",
    "true",
    "a: b",
    "null",
    "",
    "plain/path",
    "it's $HOME",
    'say "x"',
    "[a]",
    None,
    3,
    ["a", "b"],
]


@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_a_command_is_read_back_as_it_was_meant_through_the_shell_and_yaml(value: object) -> None:
    class Anything(Config):
        x: Any = 0

    program, verb, *overrides = shlex.split(command("train", {"x": value}))
    assert (program, verb) == ("diffusion-dpo", "train")
    assert load(Anything, None, overrides).x == value


def test_a_plain_path_is_not_quoted() -> None:
    assert command("train", {"data.path": Path("runs/pairs")}) == "diffusion-dpo train data.path=runs/pairs"
