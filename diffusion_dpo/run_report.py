"""`report`: what happened in a training run, as one page. Reads the run folder; writes the page and nothing else."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from diffusion_dpo.card.public import public_base, public_data, public_settings
from diffusion_dpo.card.text import lora_rank
from diffusion_dpo.config import ConfigError, ForeignPlugin, load
from diffusion_dpo.console import say
from diffusion_dpo.files import atomic_path, read_manifest, shown
from diffusion_dpo.report.page import flatten
from diffusion_dpo.report.readings import Findings, read
from diffusion_dpo.report.training_log import Log, read_log
from diffusion_dpo.report.training_page import MAX_ROWS, Film, TrainingRun, pick_columns, render
from diffusion_dpo.settings import ReportConfig, TrainConfig

PAGE, LOG = "report.html", "metrics.jsonl"


def run(config: ReportConfig) -> Path:
    """Write the page of a run folder, print what it says, and return its path."""
    run_dir = config.path.parent if config.path.name == LOG else config.path
    log = _read_log(run_dir)
    manifest = read_manifest(run_dir)
    trained, notes = _read_config(run_dir)
    relative = _is_relative(trained, log)
    max_steps, max_kl = (trained.max_steps, trained.evaluation.max_kl) if trained else (None, None)
    findings = read(log, relative=relative, max_steps=max_steps, max_kl=max_kl)
    film, broken = _read_film(run_dir / "previews", config.num_previews, trained)
    page = render(
        TrainingRun(
            name=shown(run_dir),
            log=log,
            findings=findings,
            notes=(*log.notes, *notes, *broken),
            film=film,
            facts=tuple(_facts(trained, manifest)) if trained else (),
            settings=tuple(flatten(public_settings(trained, manifest))) if trained else (),
            versions=tuple(_read_environment(run_dir / "environment.json")),
            max_steps=max_steps,
        )
    )
    folder = config.output_dir or run_dir
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_path(folder / PAGE) as partial:
        partial.write_text(page, encoding="utf-8")
    _print(findings)
    say(f"page: {folder / PAGE}")
    return folder / PAGE


def _print(findings: Findings) -> None:
    say(f"{findings.headline}.")
    for it in findings.readings:
        since = f" (since step {it.since:,})" if it.since is not None else ""
        say(f"- {it.text}{since}" + (f" {it.advice}." if it.advice else ""))


# --- the run folder --------------------------------------------------------------------------------------------------


def _read_log(run_dir: Path) -> Log:
    path = run_dir / LOG
    if not run_dir.exists():
        raise ConfigError(f"there is no folder {run_dir}; name a run of `train`: diffusion-dpo report RUN")
    if not path.is_file():
        raise ConfigError(f"{run_dir} is not a training run: {_found_instead(run_dir)}")
    with path.open(encoding="utf-8", errors="replace") as lines:
        log = read_log(lines)
    if not log.num_steps:
        why = " ".join(log.notes) or "no step is finished yet."
        raise ConfigError(f"{path} has no step to report on: {why} Train first, or wait for the first step")
    return log


def _found_instead(path: Path) -> str:
    if path.is_file():
        return "it is a file"
    runs = sorted(file.parent for file in (*path.glob(f"*/{LOG}"), *path.glob(f"*/*/{LOG}")))
    if runs:
        shown = ", ".join(map(str, runs[:4]))
        return f"{LOG} is not there, but in {shown}{', ...' * (len(runs) > 4)}; name one of these"
    made_by = read_manifest(path).get("made_by")
    if made_by == "train":
        return f"it has no {LOG}, so that no step was taken; the train command that made it goes on from there"
    if made_by:
        return f"it was made by `{made_by}`, and has no {LOG}; name the output_dir of `train`"
    names = sorted(entry.name for entry in path.iterdir())
    held = f"it holds {', '.join(names[:6])}{', ...' * (len(names) > 6)}" if names else "it is empty"
    return f"it has no {LOG} ({held}); name the output_dir of `train`"


def _read_config(run_dir: Path) -> tuple[TrainConfig | None, list[str]]:
    """Return the settings of the run, None with a note where they are missing or cannot be read."""
    path = run_dir / "config.yaml"
    if not path.is_file():
        return None, ["config.yaml is missing, so that the settings of the run are not shown."]
    try:
        return load(TrainConfig, path, is_data=True), []
    except ConfigError as error:
        return None, [f"The settings of the run are not shown: {' '.join(str(error).split())}."]


def _is_relative(config: TrainConfig | None, log: Log) -> bool:
    """Whether rewards are measured against the reference, so that 0 is where they start."""
    if config is None or isinstance(config.loss, ForeignPlugin):
        return bool(len(log.curve("errors/reference_chosen").steps))
    return bool(type(config.loss).needs_reference)


def _read_environment(path: Path) -> list[tuple[str, str]]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    return list(flatten(found)) if isinstance(found, dict) else []


def _facts(config: TrainConfig, manifest: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the settings that matter first, in words."""
    model, loss, data = (block.model_dump() for block in (config.model, config.loss, config.data))
    lora = model.get("lora")
    numbers = [f"{key}={value}" for key, value in loss.items() if key != "type" and value is not None]
    warmup = f", after {config.warmup_steps} steps of warm-up" if config.warmup_steps else ""
    pairs = manifest.get("num_pairs")
    held_out = manifest.get("num_held_out")
    lines = [
        ("model", public_base(config, manifest)),
        ("objective", " ".join([loss["type"], *numbers])),
        ("learning rate", f"{config.learning_rate:g}{warmup}"),
        ("steps", f"{config.max_steps:,} of {config.global_batch_size} pairs"),
        ("trained", f"LoRA, rank: {lora_rank(model)}" if isinstance(lora, dict) else "all weights"),
        ("pairs", f"{pairs}, and {held_out} held out" if pairs is not None and held_out is not None else ""),
        ("labelled by", ", ".join(map(str, manifest.get("labelled_by") or []))),
        ("data", f"{data['type']} {public_data(config, manifest)}".strip()),
        ("safeguard", f"mu={config.safeguard_mu:g}" if config.safeguard_mu is not None else ""),
        ("regularizers", ", ".join(f"{k}={v:g}" for k, v in config.regularizers.model_dump().items() if v)),
        ("timesteps", config.weighting.timesteps),
        ("seed", str(config.seed)),
    ]
    return [line for line in lines if line[1]]


# --- previews --------------------------------------------------------------------------------------------------------


def _read_film(folder: Path, num_columns: int, config: TrainConfig | None) -> tuple[Film | None, list[str]]:
    """Return the previews to show, and what of them could not be read."""
    found = {int(path.name[5:]): path for path in folder.glob("step-*") if path.name[5:].isdecimal()}
    steps = [step for step in sorted(found) if any(found[step].glob("*.png"))]
    numbers = sorted({int(file.stem) for step in steps for file in found[step].glob("*.png") if file.stem.isdecimal()})
    if not numbers or not num_columns:
        return None, []
    shown = pick_columns(steps, num_columns)
    rows, prompts, num_broken = [], [], 0
    for number in numbers[:MAX_ROWS]:
        files = [found[step] / f"{number:02d}.png" for step in shown]
        read = [_open(file) for file in files]
        num_broken += sum(file.exists() and it is None for file, it in zip(files, read, strict=True))
        rows.append(tuple(it[0] if it else None for it in read))
        prompts.append(_prompt(number, [it[1] for it in read if it], config))
    notes = []
    if num_broken:
        notes.append(f"{num_broken} preview{'s'[: num_broken != 1]} could not be read and are left out.")
    if len(numbers) > MAX_ROWS:
        notes.append(f"Previews of {MAX_ROWS} of {len(numbers)} prompts are shown.")
    if not any(image for row in rows for image in row):
        return None, notes
    return Film(tuple(prompts), tuple(shown), tuple(rows), len(steps)), notes


def _open(path: Path) -> tuple[Image.Image, str | None] | None:
    """Return an image and the prompt that its file names, None where there is no image or a damaged one."""
    try:
        with Image.open(path) as image:
            prompt = image.info.get("prompt")
            return image.convert("RGB"), prompt if isinstance(prompt, str) else None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):  # Pillow calls a broken PNG the third
        return None


def _prompt(number: int, named: Sequence[str | None], config: TrainConfig | None) -> str:
    prompts = config.preview.prompts if config and config.preview else ()
    known = next((str(prompt) for prompt in named if prompt is not None), None)
    return known if known is not None else prompts[number] if number < len(prompts) else f"prompt {number + 1}"
