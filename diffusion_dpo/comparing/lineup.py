"""Who takes part in a comparison: the baseline, the named models, and each of them at several strengths."""

import hashlib
import uuid
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from diffusion_dpo.card import ancestry
from diffusion_dpo.comparing import Compared
from diffusion_dpo.console import say
from diffusion_dpo.data.prompts import Prompt, prompt_hash
from diffusion_dpo.files import put_in_place, read_manifest
from diffusion_dpo.processes import Processes
from diffusion_dpo.report import BASELINE
from diffusion_dpo.report.training_log import Point, read_log
from diffusion_dpo.sampling import adapter_hash, weights_hash
from diffusion_dpo.settings import CompareConfig, ImageModel
from diffusion_dpo.training.state import is_checkpoint, save_result


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
        scales = config.adapter_scales if model.adapter_path is not None else ()
        for shown, scale in zip(config.names_of(name), scales or (model.adapter_scale,), strict=True):
            found.append(_compared(shown, model.model_copy(update={"adapter_scale": scale}), config))
    return found


def training_facts(adapter_path: Path) -> tuple[Path | None, dict[str, Any]]:
    """Return the run folder that an adapter or a checkpoint lies in, with its manifest; (None, {}) without one."""
    start = adapter_path.parent if adapter_path.is_file() else adapter_path
    for folder in (start, start.parent, start.parent.parent):
        manifest = read_manifest(folder)
        if manifest.get("made_by") == "train":
            return folder, manifest
    return None, {}


def num_trained_on(compared: Compared, prompts: Sequence[Prompt]) -> int:
    """Count the prompts that a model, or what it started from, was trained on, as far as manifests say."""
    return sum(prompt_hash(prompt.text) in compared.prompt_hashes for prompt in prompts)


def implicit_accuracy(compared: Compared) -> Point | None:
    """Return the accuracy on held-out pairs that training measured last (at the checkpoint).

    None where there is no run folder, nothing was held out, or the adapter is not at the strength of its training.
    """
    if compared.trained_by is None or compared.model.adapter_scale != 1:
        return None
    try:
        text = (compared.trained_by / "metrics.jsonl").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    points = read_log(text.splitlines(keepends=True)).points("eval/accuracy")
    known = [point for point in points if compared.step is None or point.step <= compared.step]
    return known[-1] if known else None


def _compared(name: str, model: ImageModel, config: CompareConfig) -> Compared:
    path = model.adapter_path
    found = ancestry.of_model(model.pretrained, path)
    known = found.labelled_by or (None if found.judges_not_known else ())
    if config.trained_on is not None and name != BASELINE:
        found, known = replace(found, judges_not_known=()), config.trained_on
    compared = Compared(
        name,
        model,
        "" if path is not None and is_checkpoint(path) else weights_hash(model),
        labelled_by=known,
        judges_not_known=found.judges_not_known if known else (),
        lineage=found.lineage,
        prompt_hashes=found.prompt_hashes,
    )
    if path is None:
        return compared
    run, _ = training_facts(path)
    if not is_checkpoint(path):
        return replace(compared, adapter=adapter_hash(path), trained_by=run)
    step = int(path.name.partition("-")[2])
    written = _adapter_of(config, path)
    model = model.model_copy(update={"adapter_path": written})
    return replace(
        compared, model=model, weights=weights_hash(model), adapter=adapter_hash(written), trained_by=run, step=step
    )


def _write_adapter(config: CompareConfig, checkpoint: Path) -> None:
    folder = _adapter_of(config, checkpoint)
    if not folder.exists():
        say(f"{checkpoint}: written as an adapter, {folder}")
        staging = config.output_dir / f".{folder.name}.{uuid.uuid4().hex[:8]}.partial"
        save_result(checkpoint, staging)
        folder.parent.mkdir(exist_ok=True)
        put_in_place(staging, folder)


def _adapter_of(config: CompareConfig, checkpoint: Path) -> Path:
    """Return where a checkpoint's adapter goes, by the checkpoint's content."""
    content = hashlib.sha256((checkpoint / "manifest.json").read_bytes()).hexdigest()[:12]
    return config.output_dir / "adapters" / f"{checkpoint.name}-{content}"
