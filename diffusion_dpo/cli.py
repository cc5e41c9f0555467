"""The command line: one sub-command per verb, settings as `key=value`, and exit codes that scripts can rely on.

0 done; 1 a bug of ours, with its traceback; 2 something that the user can mend, in one message without a traceback;
128 + n stopped by signal n, after saving (130 Ctrl-C, 143 `kill`). Nothing heavy is imported at the top: a verb's
module is imported once its settings are known to be right.
"""

import errno
import importlib
import json
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from diffusion_dpo import __version__, interrupt, processes
from diffusion_dpo.config import Config, ConfigError, load, refuse_lost
from diffusion_dpo.settings import VERBS, CheckConfig, DemoConfig, TrainConfig


class _Verbs(TyperGroup):
    """The list of verbs, each with its whole sentence."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write the list; `ctx` and `formatter` are typer's."""
        with formatter.section("Verbs"):
            formatter.write_dl([(name, command.help or "") for name, command in self.commands.items()])


app = typer.Typer(
    cls=_Verbs,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    subcommand_metavar="VERB [CONFIG.yaml] [key=value ...]",
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line (default: that of this process) and return its exit code."""
    interrupt.install()
    try:
        code = app(args=arguments, prog_name="diffusion-dpo", standalone_mode=False) or 0
        sys.stdout.flush()
    except typer.TyperException as error:
        return _fail(f"{error.format_message()}\nSee `diffusion-dpo --help`.")
    except interrupt.Interrupted as stopped:
        return _stopped(stopped.exit_code)
    except BrokenPipeError:  # `... | head`: whoever read our output has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + 13
    except ConfigError as error:
        return _fail(str(error))
    except SystemExit as error:  # of a plug-in; with its code, 0 perhaps, nobody would see a failure
        place = traceback.extract_tb(error.__traceback__)[-1]
        return _fail(
            f"{Path(place.filename).name} line {place.lineno} ended the program by sys.exit({error.code!r}) before it "
            "was done. A plug-in returns, or raises an error that says what is wrong"
        )
    except Exception:  # noqa: BLE001 - the outermost frame: every failure becomes an exit code
        _say_of_failure(traceback.format_exc().rstrip())
        return _fail(
            "this is a bug. Please report it, with the lines above and `diffusion-dpo doctor --json`.", code=1
        )
    return _stopped(code) if code == 130 else code  # typer turns a KeyboardInterrupt into 130


@app.callback(invoke_without_command=True)
def _top(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    """Tune text-to-image diffusion models on preferences, with an honest before/after report.

    generate -> score -> pair -> train -> compare. Every verb takes a YAML file, key=value settings, or both, and runs
    from its defaults without either; the same command again continues where it stopped.

    To see all of it in a few minutes: diffusion-dpo demo
    """
    if version:
        typer.echo(f"diffusion-dpo {__version__}")
    elif context.invoked_subcommand is None:
        typer.echo(context.get_help())


# --- the verbs -------------------------------------------------------------------------------------------------------


class _VerbCommand(TyperCommand):
    """A command whose help lists every setting of its verb. `ctx` and `formatter` are typer's."""

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """Return what follows the verb in the usage line."""
        first = {"inspect": "[PATH]", "report": "[PATH]", "train": "[CONFIG.yaml | PATH]"}
        return [first.get(self.name or "", "[CONFIG.yaml]"), "[key=value ...]"]

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write usage, the verb's one sentence, its options and its settings."""
        from diffusion_dpo.cli_help import describe_settings

        assert self.name is not None
        super().format_help(ctx, formatter)
        formatter.write("\n" + describe_settings(_CONFIGS[self.name], width=formatter.width))


_CONFIGS: dict[str, type[Config]] = {**VERBS, "demo": DemoConfig}
_Arguments = Annotated[list[str] | None, typer.Argument(hidden=True)]
_SETTINGS = {"ignore_unknown_options": True}  # _split says how settings are written


def _add_verb(verb: str) -> None:
    def command(arguments: _Arguments = None) -> None:
        path, overrides = _split(arguments or [])
        _run(verb, load(_CONFIGS[verb], path, overrides))

    app.command(verb, help=_CONFIGS[verb].__doc__, cls=_VerbCommand, context_settings=_SETTINGS)(command)


for _verb in VERBS:
    if _verb not in ("inspect", "label", "train", "report", "compare", "export"):
        _add_verb(_verb)


@app.command("train", help=VERBS["train"].__doc__, cls=_VerbCommand, context_settings=_SETTINGS)
def _train(
    arguments: _Arguments = None,
    find_beta: Annotated[
        bool, typer.Option("--find-beta", help="Recommend beta and learning_rate, from short probes; trains nothing.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print steps, disk and memory that the run will take; writes nothing.")
    ] = False,
) -> None:
    if find_beta and dry_run:
        raise ConfigError("--find-beta and --dry-run are two different things; give one of them")
    path, overrides = _split(arguments or [])
    if path is not None and Path(path).suffix.lower() not in (".yaml", ".yml"):
        path, overrides = None, [f"data.path={json.dumps(path)}", *overrides]
    _run("dry_run" if dry_run else "find_beta" if find_beta else "train", load(VERBS["train"], path, overrides))


@app.command("label", help=VERBS["label"].__doc__, cls=_VerbCommand, context_settings=_SETTINGS)
def _label(
    arguments: _Arguments = None,
    export: Annotated[
        bool, typer.Option("--export", help="Write the pairs of the votes so far; serves no page.")
    ] = False,
) -> None:
    path, overrides = _split(arguments or [])
    config = load(VERBS["label"], path, overrides)
    _run("label", config, function="export" if export else "run")


@app.command("compare", help=VERBS["compare"].__doc__, cls=_VerbCommand, context_settings=_SETTINGS)
def _compare(
    arguments: _Arguments = None,
    power: Annotated[
        float | None,
        typer.Option("--power", help="Print how many prompts would show this win rate, e.g. 0.6; draws nothing."),
    ] = None,
) -> None:
    path, overrides = _split(arguments or [])
    config = load(VERBS["compare"], path, overrides)
    if power is None:
        _run("compare", config)
    else:
        _run("power", config, power)


@app.command("export", help=VERBS["export"].__doc__, cls=_VerbCommand, context_settings=_SETTINGS)
def _export(
    arguments: _Arguments = None,
    check: Annotated[
        bool,
        typer.Option("--check", help="Say what a FILE is, whether it fits [pretrained=...], and what it changes."),
    ] = False,
) -> None:
    if check:
        _run("check", load(CheckConfig, None, _path_first(arguments)))
    else:
        _run("export", load(VERBS["export"], *_split(arguments or [])))


@app.command("inspect", help=VERBS["inspect"].__doc__, cls=_VerbCommand, context_settings=_SETTINGS)
def _inspect(arguments: _Arguments = None) -> None:
    _run("inspect", load(VERBS["inspect"], None, _path_first(arguments)))


@app.command("report", help=VERBS["report"].__doc__, cls=_VerbCommand, context_settings=_SETTINGS)
def _report(arguments: _Arguments = None) -> None:
    _run("run_report", load(VERBS["report"], None, _path_first(arguments)))  # report/ is what draws all pages


def _path_first(arguments: list[str] | None) -> list[str]:
    """Return the settings of a verb whose first argument may be its `path`."""
    path, overrides = _split(arguments or [])
    if path is not None:
        overrides = [f"path={json.dumps(path)}", *overrides]  # JSON quotes what YAML would misread
    return overrides


@app.command("doctor", help="What this machine can do: device, precision, memory, disk, versions, extras, the hub.")
def _doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for a bug report.")] = False,
) -> None:
    from diffusion_dpo import doctor

    raise typer.Exit(doctor.run(as_json))


@app.command("demo", help=DemoConfig.__doc__, cls=_VerbCommand, context_settings=_SETTINGS)
def _demo(
    arguments: _Arguments = None,
    output_dir: Annotated[Path | None, typer.Option(help="The same as output_dir=...", show_default=False)] = None,
    seed: Annotated[int | None, typer.Option(help="The same as seed=...", show_default=False)] = None,
) -> None:
    path, overrides = _split(arguments or [])
    options = {"output_dir": output_dir and str(output_dir), "seed": seed}
    overrides += [f"{key}={json.dumps(value)}" for key, value in options.items() if value is not None]
    _run("demo", load(DemoConfig, path, overrides))


def _split(arguments: list[str]) -> tuple[str | None, list[str]]:
    """Split off the first argument when it is a path, i.e. has no `=`."""
    for argument in arguments:
        if argument.startswith("-"):
            name, _, value = argument.lstrip("-").replace("-", "_").partition("=")
            raise ConfigError(
                f"there is no option {argument}; settings are written without dashes: {name}={value or '...'}"
            )
    path, overrides = (arguments[0], arguments[1:]) if arguments and "=" not in arguments[0] else (None, arguments)
    refuse_lost(overrides)
    return path, overrides


def _run(verb: str, config: Config, *arguments: float, function: str = "run") -> None:
    """Import a verb, which is what takes seconds, and run it. What the system refuses becomes a ConfigError."""
    run: Callable[..., object] = getattr(importlib.import_module(f"diffusion_dpo.{verb}"), function)
    try:
        run(config, *arguments)
    except ConfigError:
        raise
    except Exception as error:
        message = _refusal(error, config)
        if message is None:
            raise
        raise ConfigError(message) from error


# --- failures --------------------------------------------------------------------------------------------------------


def _fail(message: str, *, code: int = 2) -> int:
    """Say once, whatever the number of processes, what went wrong; return the exit code."""
    if processes.speaks_of_failure():
        _say_of_failure(f"error: {message}")
    return code


def _say_of_failure(text: str) -> None:
    from diffusion_dpo.console import plain

    print(plain(text), file=sys.stderr)


def _stopped(code: int) -> int:
    if processes.speaks_of_failure():
        print("stopped; the same command again continues from what is saved", file=sys.stderr)
    return code


def _refusal(error: Exception, config: Config) -> str | None:
    """Return what to tell the user when disk, permissions or memory were refused, None for everything else."""
    number = error.errno if isinstance(error, OSError) else None
    places = (
        error.filename if isinstance(error, OSError) else None,
        *map(config.model_dump().get, ("output_dir", "path")),
    )
    where = next((place for place in places if place), ".")
    text = str(error)
    if number in (errno.ENOSPC, errno.EDQUOT) or "No space left on device" in text:  # the latter from safetensors
        return f"no space left on the disk of {where}. What was finished is kept: free some, then run the same again"
    if number in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"{where}: {os.strerror(number)}. Choose another folder, or mend its permissions"
    if number in (errno.ENOTDIR, errno.EEXIST, errno.EISDIR):
        return f"{where}: {os.strerror(number)}. Give a folder that exists or can be made"
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in text:
        traceback.clear_frames(error.__traceback__)  # what the run still holds goes, or there is no room to think in
        return f"out of memory: {text.splitlines()[0] if text else 'the machine has no more'}\n{_relief(config)}"
    return None


def _relief(config: Config) -> str:
    """Return what to change to need less memory: of a training run with numbers, where they can be had."""
    if isinstance(config, TrainConfig):
        from diffusion_dpo.dry_run import relief

        try:
            changes = relief(config)
        except (ConfigError, ImportError, MemoryError, OSError, RuntimeError):
            changes = []
        if changes:
            return "To need less (estimates; checkpoints are as they were): " + "; ".join(changes)
    return (
        "To need less: a smaller per_device_batch_size, batch_size or sampling.batch_size; a smaller resolution_px; "
        "gradient_checkpointing=true when training"
    )
