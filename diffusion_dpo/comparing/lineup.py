"""Who takes part in a comparison: the baseline, the named models, and each of them at several strengths."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffusion_dpo.comparing import Compared
from diffusion_dpo.config import ConfigError, load
from diffusion_dpo.console import say
from diffusion_dpo.data.prompts import Prompt, prompt_hash
from diffusion_dpo.files import read_manifest
from diffusion_dpo.models.adapters import find_adapter
from diffusion_dpo.processes import Processes
from diffusion_dpo.report import BASELINE
from diffusion_dpo.sampling import weights_hash
from diffusion_dpo.settings import CompareConfig, ImageModel, TrainConfig
from diffusion_dpo.training.state import is_checkpoint, run_of, save_result


def refuse_missing(config: CompareConfig) -> None:
    """Raise ConfigError where an adapter is not there, or the run that a checkpoint is of."""
    named = {f"models.{name}": model for name, model in config.models.items()}
    for name, model in {"baseline": config.baseline, **named}.items():
        path = model.adapter_path
        if path is None:
            continue
        try:
            if is_checkpoint(path):
                load(TrainConfig, run_of(path) / "config.yaml")
            else:
                find_adapter(path)
        except ConfigError as error:
            hint = "" if path.exists() else "; train one, or name yours: models.tuned.adapter_path=FOLDER"
            raise ConfigError(f"{name}: {error}{hint}") from None


def line_up(config: CompareConfig, processes: Processes) -> list[Compared]:
    """Return the models, the baseline first, and each of the others at every strength that is asked for.

    A checkpoint of a run takes part as the adapter that training would have ended with there, which is written to
    `output_dir/adapters`.
    """
    if processes.is_main:
        for model in (config.baseline, *config.models.values()):
            if model.adapter_path is not None and is_checkpoint(model.adapter_path):
                _write_adapter(config, model.adapter_path)
    processes.wait()
    found = [_compared(BASELINE, config.baseline, config)]
    for name, model in config.models.items():
        if model.adapter_path is None or not config.adapter_scales:
            found.append(_compared(name, model, config))
            continue
        for scale in config.adapter_scales:
            scaled = model.model_copy(update={"adapter_scale": scale})
            found.append(_compared(f"{name}@{scale:g}", scaled, config))
    return found


def training_facts(adapter_path: Path) -> tuple[Path | None, dict[str, Any]]:
    """Return the run folder that an adapter or a checkpoint lies in, with its manifest; (None, {}) without one."""
    start = adapter_path.parent if adapter_path.is_file() else adapter_path
    for folder in (start, start.parent, start.parent.parent):
        manifest = read_manifest(folder)
        if manifest.get("made_by") == "train":
            return folder, manifest
    return None, {}


def trained_on_metrics(adapter_path: Path) -> tuple[str, ...]:
    """Return the metrics that labelled an adapter's training pairs, as its run folder says; () where none does."""
    return tuple(training_facts(adapter_path)[1].get("labelled_by", ()))


def num_trained_on(compared: Compared, prompts: Sequence[Prompt]) -> int:
    """Count the prompts that a model's adapter was trained on, as far as its run folder says."""
    if compared.trained_by is None:
        return 0
    seen = set(read_manifest(compared.trained_by).get("prompt_hashes", ()))
    return sum(prompt_hash(prompt.text) in seen for prompt in prompts)


def implicit_accuracy(compared: Compared) -> tuple[float, float] | None:
    """Return the accuracy on held-out pairs that training measured last (at the checkpoint), and its standard error.

    None where there is no run folder, or nothing was held out.
    """
    if compared.trained_by is None:
        return None
    try:
        lines = (compared.trained_by / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    for line in reversed(lines):
        try:
            row = json.loads(line)
        except ValueError:  # cut short by a crash
            continue
        if compared.step is not None and row.get("step", 0) > compared.step:
            continue
        if row.get("eval/accuracy") is not None:
            return float(row["eval/accuracy"]), float(row.get("eval/accuracy/se") or 0.0)
    return None


def _compared(name: str, model: ImageModel, config: CompareConfig) -> Compared:
    if model.adapter_path is None:
        return Compared(name, model, weights_hash(model))
    run, _ = training_facts(model.adapter_path)
    step = None
    if is_checkpoint(model.adapter_path):
        step = int(model.adapter_path.name.partition("-")[2])
        model = model.model_copy(update={"adapter_path": _adapter_of(config, model.adapter_path)})
    return Compared(name, model, weights_hash(model), run, step)


def _write_adapter(config: CompareConfig, checkpoint: Path) -> None:
    folder = _adapter_of(config, checkpoint)
    if not folder.exists():
        say(f"{checkpoint}: written as an adapter, {folder}")
        save_result(checkpoint, folder)


def _adapter_of(config: CompareConfig, checkpoint: Path) -> Path:
    """Return where a checkpoint's adapter goes, by the checkpoint's content."""
    content = hashlib.sha256((checkpoint / "manifest.json").read_bytes()).hexdigest()[:12]
    return config.output_dir / "adapters" / f"{checkpoint.name}-{content}"
