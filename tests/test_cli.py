"""The command line: help, exit codes, one clear message for what people can mend, and orderly stops."""

import errno
import os
import resource
import signal
import subprocess
import sys
import textwrap
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from diffusion_dpo import __version__, interrupt
from diffusion_dpo.cli import main
from diffusion_dpo.config import Config, ConfigError
from diffusion_dpo.settings import VERBS, InspectConfig

Verb = Callable[[Config], object]


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """Start from Python's own signal handlers (in the background, SIGINT is ignored), and leave all as it was."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def verb(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, Verb], None]:
    """Put a function of the test's own in the place of a verb's module."""

    def replace(name: str, run: Verb) -> None:
        module = types.ModuleType(f"diffusion_dpo.{name}")
        module.run = run  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, module.__name__, module)

    return replace


def raising(error: BaseException) -> Verb:
    def run(config: Config) -> None:
        raise error

    return run


# --- help ------------------------------------------------------------------------------------------------------------


def test_help_names_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"\n  {name} " in text for name in (*VERBS, "doctor", "demo"))
    assert max(map(len, text.splitlines())) <= 80


@pytest.mark.parametrize("name", [*VERBS, "demo"])
def test_help_of_a_verb_lists_its_settings(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([name, "--help"]) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"Usage: diffusion-dpo {name} [")
    assert ("  repo_id=" if name == "push" else "  output_dir=") in text


def test_without_a_verb_the_help_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    assert "Verbs:" in capsys.readouterr().out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"diffusion-dpo {__version__}\n"


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["train", "--help"], ["train", "sed=1"], ["train", "loss.betta=1"], ["score", "scorers=[clpi]"]],
    ids=" ".join,
)
def test_help_and_typos_answer_in_half_a_second(arguments: list[str]) -> None:
    """CPU seconds rather than those on the clock, and the best of a few: a busy machine only adds to them."""

    def seconds() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-m", "diffusion_dpo", *arguments], capture_output=True, check=False)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    assert any(seconds() <= 0.5 for _ in range(6))


# --- arguments -------------------------------------------------------------------------------------------------------


def test_a_file_and_overrides_reach_the_verb(verb: Callable[[str, Verb], None], tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("max_steps: 3\nseed: 1")
    seen: list[Config] = []
    verb("train", seen.append)
    assert main(["train", str(tmp_path / "run.yaml"), "seed=2", "model.pretrained=here"]) == 0
    assert main(["train"]) == 0
    settings = [config.model_dump() for config in seen]
    assert [(s["max_steps"], s["seed"], s["model"]["pretrained"]) for s in settings] == [
        (3, 2, "here"),
        (200, 0, "pocket"),
    ]


def test_inspect_takes_a_path_whatever_its_letters(verb: Callable[[str, Verb], None]) -> None:
    seen: list[Config] = []
    verb("inspect", seen.append)
    for path in ("runs/pairs", "1e3", "a: b #c", "null"):
        assert main(["inspect", path, "num_images=3"]) == 0
        assert seen[-1] == InspectConfig(path=Path(path), num_images=3)


@pytest.mark.parametrize("arguments", [["--output-dir", "1e3", "--seed", "4"], ["output_dir='1e3'", "seed=4"]])
def test_demo_takes_options_and_settings(arguments: list[str], verb: Callable[[str, Verb], None]) -> None:
    seen: list[Config] = []
    verb("demo", seen.append)
    assert main(["demo", *arguments]) == 0
    assert seen[0].model_dump() == {"output_dir": Path("1e3"), "seed": 4}


# --- failures --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["tarin"], "Did you mean 'train'?"),
        (["--foo"], "No such option: --foo"),
        (["train", "sed=1"], "sed: there is no such setting. Did you mean seed?"),
        (["train", "loss.betta=1"], "Did you mean loss.beta?"),
        (["train", "--learning-rate=1"], "settings are written without dashes: learning_rate=1"),
        (["train", "no_such.yaml"], "there is no config file no_such.yaml"),
        (["train", "seed=1", "oops"], "'oops' is not a setting"),
        (["generate", "prompts_path=no_such.txt", "output_dir=/tmp/never"], "no_such.txt"),
        (["demo", "--seed", "x"], "--seed"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_people_can_mend_is_one_message_and_code_2(
    arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert says in captured.err
    assert "Traceback" not in captured.err


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (ConfigError("the thing is missing"), "the thing is missing"),
        (OSError(errno.ENOSPC, "No space left on device"), "no space left on the disk of runs/there"),
        (OSError(errno.ENOSPC, "No space left on device", "/data/x"), "no space left on the disk of /data/x"),
        (RuntimeError("I/O error: No space left on device (os error 28)"), "no space left on the disk of runs/there"),
        (PermissionError(errno.EACCES, "Permission denied", "/protected/x"), "/protected/x: Permission denied"),
        (MemoryError(), "out of memory: the machine has no more"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to"), "per_device_batch_size"),
    ],
)
def test_what_the_system_refuses_is_one_message_and_code_2(
    error: Exception, says: str, verb: Callable[[str, Verb], None], capsys: pytest.CaptureFixture[str]
) -> None:
    verb("train", raising(error))
    assert main(["train", "output_dir=runs/there"]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert says in message
    assert "Traceback" not in message


def test_a_bug_shows_its_traceback_and_asks_for_a_report(
    verb: Callable[[str, Verb], None], capsys: pytest.CaptureFixture[str]
) -> None:
    verb("train", raising(KeyError("oops")))
    assert main(["train"]) == 1
    message = capsys.readouterr().err
    assert "KeyError: 'oops'" in message
    assert "diffusion-dpo doctor --json" in message


def test_a_reader_that_leaves_early_is_not_an_error() -> None:
    command = f"{sys.executable} -m diffusion_dpo train --help"
    done = subprocess.run(["bash", "-c", f"set -o pipefail; {command} | head -1"], capture_output=True, check=False)
    assert done.stderr == b""
    assert done.stdout.startswith(b"Usage: diffusion-dpo train")


# --- stops -----------------------------------------------------------------------------------------------------------

WORK = """
    import signal, sys, time, types
    from diffusion_dpo import cli, interrupt

    signal.signal(signal.SIGINT, signal.default_int_handler)

    def run(config):
        {body}

    module = sys.modules["diffusion_dpo.train"] = types.ModuleType("diffusion_dpo.train")
    module.run = run
    sys.exit(cli.main(["train"]))
"""
PLAIN = """
        try:
            print("ready", flush=True)
            time.sleep(30)
        finally:
            print("cleaned up", flush=True)
"""
DEFERRED = """
        with interrupt.deferred() as stop:
            print("ready", flush=True)
            for step in range(300):
                time.sleep(0.1)
                if stop.requested:
                    print("cleaned up", flush=True)
                    raise stop.exception
"""


@pytest.mark.parametrize("body", [PLAIN, DEFERRED], ids=["plain", "deferred"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda number: number.name)
def test_a_signal_ends_a_verb_after_it_has_cleaned_up(body: str, number: signal.Signals) -> None:
    program = textwrap.dedent(WORK).format(body=textwrap.indent(textwrap.dedent(body), "    ").strip())
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
        out, err = process.communicate(timeout=20)
    assert process.returncode == 128 + number
    assert out == "cleaned up\n"
    assert err == "stopped; the same command again continues from what is saved\n"


def test_a_second_signal_does_not_wait_but_an_echo_of_the_first_counts_for_nothing() -> None:
    """A launcher passes on the Ctrl-C that the terminal has sent to all processes already."""

    def work() -> None:
        with interrupt.deferred() as stop:
            os.kill(os.getpid(), signal.SIGINT)
            assert stop.requested
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1.1)
            os.kill(os.getpid(), signal.SIGTERM)
            pytest.fail("the second signal must raise at once")

    with pytest.raises(interrupt.Interrupted) as caught:
        work()
    assert caught.value.exit_code == 143


def test_a_request_that_nobody_answered_is_not_lost() -> None:
    with pytest.raises(interrupt.Interrupted) as caught, interrupt.deferred():
        os.kill(os.getpid(), signal.SIGINT)
    assert caught.value.exit_code == 130


def test_deferred_leaves_the_handlers_as_they_were_and_ignored_signals_ignored() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    before = signal.getsignal(signal.SIGINT)
    with interrupt.deferred() as stop:
        os.kill(os.getpid(), signal.SIGHUP)
        assert not stop.requested
    assert signal.getsignal(signal.SIGINT) is before
    interrupt.install()
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN


# --- the package -----------------------------------------------------------------------------------------------------


def test_public_names_are_there_and_come_late() -> None:
    import diffusion_dpo

    for name in diffusion_dpo.__all__:
        assert getattr(diffusion_dpo, name) is not None
    assert set(diffusion_dpo.__all__) < set(dir(diffusion_dpo))
    with pytest.raises(AttributeError, match="no_such_name"):
        diffusion_dpo.no_such_name  # noqa: B018
    program = "import sys, diffusion_dpo; assert not {'torch', 'pydantic', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)


EXITING = """
import sys
from diffusion_dpo.losses.dpo import DPO
from diffusion_dpo.strategies.best_worst import BestWorst
from diffusion_dpo.scorers.brightness import Brightness

class Loss(DPO):
    def __call__(self, *arguments, **settings):
        sys.exit(0)

class Loads(Brightness):
    def load(self, device):
        sys.exit(0)

class Scores(Brightness):
    def score(self, batch):
        sys.exit(0)
"""


@pytest.mark.parametrize(
    ("scorer", "says"),
    [
        ("Loads", "exiting.py line 13 ended the program by sys.exit(0) before it was done"),
        ("Scores", "the scorer exiting:Scores fails on every image: SystemExit: 0 (exiting.py line 17)"),
    ],
)
def test_a_scorer_that_exits_has_failed(
    scorer: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from PIL import Image

    monkeypatch.chdir(tmp_path)
    Path("exiting.py").write_text(EXITING)
    Path("images").mkdir()
    for number in range(9):
        Image.new("RGB", (32, 32), (number + 1, 0, 0)).save(f"images/{number}.png")
    assert main(["score", "path=images", f"scorers=[exiting:{scorer}]", "device=cpu"]) == 2
    assert says in capsys.readouterr().err
    monkeypatch.delitem(sys.modules, "exiting")


def test_a_module_that_exits_when_it_is_imported_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("leaving.py").write_text("import sys\nsys.exit(0)\n")
    for setting in ("scorers=[leaving:A]", "loss.type=leaving:A", "strategy=leaving:A"):
        verb = {"s": "score", "l": "train"}[setting[0]] if "strategy" not in setting else "pair"
        assert main([verb, setting]) == 2
        assert "type 'leaving:A' cannot be imported: 0" in capsys.readouterr().err


def test_data_that_exit_while_they_are_read_have_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    lines = ["import sys", "from diffusion_dpo.data import PairSource", "class Data(PairSource):"]
    Path("quitting.py").write_text("\n".join([*lines, "    def read(self):", "        sys.exit(0)", ""]))
    assert main(["train", "data.type=quitting:Data", "output_dir=run", "device=cpu"]) == 2
    assert "quitting.py line 5 ended the program by sys.exit(0) before it was done" in capsys.readouterr().err
