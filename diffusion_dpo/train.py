"""`train`: preference pairs -> a tuned model, by Diffusion-DPO against a frozen reference.

Whatever stops a run, the same command finishes it as if nothing had happened: sample order, noise, timesteps and
dropout are functions of (seed, epoch, pair), so the state of a run is its weights, its optimizer and one step number.
"""

import hashlib
import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from diffusion_dpo import card, interrupt
from diffusion_dpo.card import ancestry
from diffusion_dpo.card.ancestry import Ancestry
from diffusion_dpo.card.public import public_base, public_data, public_start
from diffusion_dpo.config import ConfigError, dump
from diffusion_dpo.console import progress, say, warn
from diffusion_dpo.data import PairSource, collect
from diffusion_dpo.data.index import Collected
from diffusion_dpo.data.prompts import key_hash
from diffusion_dpo.data.recognise import settle
from diffusion_dpo.device import pick_device, pick_dtype
from diffusion_dpo.files import atomic_path, claim, finish
from diffusion_dpo.models import DiffusionModel, LoadedModel
from diffusion_dpo.processes import Processes, explain_lost_process
from diffusion_dpo.settings import TrainConfig
from diffusion_dpo.tracking import Tracker
from diffusion_dpo.training import Run
from diffusion_dpo.training.errors import Batch, denoising_errors
from diffusion_dpo.training.evaluation import progress_note
from diffusion_dpo.training.metrics import Totals, refuse_not_finite
from diffusion_dpo.training.optimizers import refuse_optimizer
from diffusion_dpo.training.parallel import gather, refuse_launcher, whole
from diffusion_dpo.training.previews import preview_if_due
from diffusion_dpo.training.setup import name_ignored, prepare, refuse_contradictions, refuse_uneven
from diffusion_dpo.training.state import refuse_not_finite_result, resume, save

if TYPE_CHECKING:
    import torch

# What may change between two runs of one command without making it another run.
_NOT_IDENTITY: Any = {
    "data": True,  # its content is recorded instead, wherever it lies
    "model": {"pretrained", "revision", "variant", "adapter_path"},  # and of these the weights
    "max_steps": True,
    "per_device_batch_size": True,
    "gradient_checkpointing": True,
    "compile": True,
    "device": True,
    "mixed_precision": True,  # the resolved dtype is recorded instead
    "dataloader_num_workers": True,
    "checkpointing_steps": True,
    "checkpoints_total_limit": True,
    "preview": True,
    "evaluation": {"every_steps", "max_kl"},
    "max_broken_share": True,
    "cache_dir": True,
    "output_dir": True,
}
_LAYOUT = 2
"""Of what a run is known by, and of its checkpoints; a run of another one is not continued."""
_STEP_ZERO_TOLERANCE = 1e-3
_MAX_PROMPT_HASHES = 100_000


def run(config: TrainConfig) -> Path:
    """Train, or continue, or find that nothing is left to do; return the folder of the adapter or full UNet."""
    refuse_contradictions(config)
    name_ignored(config)
    processes = Processes.join(config.device)
    refuse_uneven(config, processes)
    refuse_launcher(config, processes)
    config = settle(config)
    device = pick_device(config.device)
    refuse_optimizer(config, device)
    dtype = pick_dtype(config.mixed_precision, device)
    data = _look_at_data(config) if processes.is_main else None  # before a model is loaded, which takes longer
    model = cast(DiffusionModel, config.model).load(device=device, dtype=dtype, seed=config.seed)
    try:
        adapter = _run(config, model, data, dtype, processes)
        processes.leave()
    except RuntimeError as error:
        raise explain_lost_process(error) or error from error
    say(f"trained: {adapter}\nlog: {config.output_dir / 'metrics.jsonl'}")
    if adapter.name == "adapter":
        say(f"for ComfyUI, A1111 and Forge: {card.export_command(config.output_dir)}")
    say(f"look: {card.report_command(config.output_dir)}")
    say(f"next: {card.compare_command(config)}")
    return adapter


def _index_dir(config: TrainConfig) -> Path:
    return (config.cache_dir or config.output_dir / "cache") / "index"


def _look_at_data(config: TrainConfig) -> Collected:
    source = cast(PairSource, config.data)
    return collect.collect(source, max_broken_share=config.max_broken_share, index_dir=_index_dir(config))


def _run(
    config: TrainConfig, model: LoadedModel, data: Collected | None, dtype: "torch.dtype", processes: Processes
) -> Path:
    if data is None:
        processes.wait()  # until the main process has looked at the data and taken the folder
        data = _look_at_data(config)
    identity = {
        **config.model_dump(mode="json", exclude=_NOT_IDENTITY),
        "precision": str(dtype).removeprefix("torch."),
        "base_weights": model.base_hash,
        "encoders": model.encoder_hash,
        "data": {"content": data.fingerprint, "num_rows": len(data)},
        "layout": _LAYOUT,
    }
    found = _stands_on(config, data)
    way_on = f"train on from its result: output_dir=ANOTHER model.adapter_path={shlex.quote(str(config.output_dir))}"
    claimed = claim(config.output_dir, "train", identity, facts=found.facts(), way_on=way_on)
    context: AbstractContextManager[dict[str, Any]] = claimed if processes.is_main else nullcontext({})
    with context as before:
        if processes.is_main:
            _write_text(config.output_dir / "config.yaml", dump(config))
            card.write_environment(config.output_dir / "environment.json")
            data.save(_index_dir(config))
            processes.wait()
        if processes.from_main(data.fingerprint) != data.fingerprint:
            raise ConfigError("the processes read different data: give all of them the same files, on a disk all see")
        state = prepare(config, model, data, dtype, processes)
        state.identity = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
        trained_to = _train(state, data.prompts[:4])
        with state.as_result():
            refuse_not_finite_result(state, config.output_dir / "checkpoints")
            gather(state)
            adapter = card.save_model(model, config.output_dir) if processes.is_main else config.output_dir
        num_held_out = len(state.held_out.examples) if state.held_out else 0
        facts = {
            "steps": trained_to,
            "num_pairs": len(data) - num_held_out,
            "num_held_out": num_held_out,
            "drops": data.drops,
            "base": public_base(config, {}),
            "data": public_data(config, {}),
            "start": public_start(config),
            **_distances(state),
            **found.still(before).facts(),
        }
        if processes.is_main:
            card.write_card(config, adapter, facts)
            finish(config.output_dir, "train", identity, **facts)
    return adapter


def _stands_on(config: TrainConfig, data: Collected) -> Ancestry:
    """Return what the result stands on, the pairs and all that its start was trained on; say where that is open."""
    source, settings = cast(PairSource, config.data), config.model.model_dump()
    start = ancestry.of_model(str(settings.get("pretrained", "")), settings.get("adapter_path"))
    for name in start.judges_not_known:
        warn(
            f"training starts from {name}: its judges are not known, so that `compare` cannot tell which metrics are "
            "held out; name those that labelled its pairs there, as trained_on"
        )
    own = {
        "labelled_by": source.labelled_by(),
        "lineage": sorted(source.lineage),
        "prompt_hashes": _prompt_hashes(data.prompt_keys),
    }
    return ancestry.of_facts(own, config.output_dir.resolve().name) | start


def _distances(run: Run) -> dict[str, float | str | None]:
    """Return how far the result is from what training started from, and from the model that all began with.

    Null where it was not measured; `kl_base_missing` says why, where that is not for want of held-out pairs.
    """
    kl = None if run.held_out is None else run.kl
    kl_base = kl if run.model.original() is None else run.kl_base
    lost = run.model.original_lost
    if ancestry.of_model(str(run.config.model.model_dump().get("pretrained", "")), None) != Ancestry():
        lost = "the pretrained model is itself a tuned one, merged, and what it was tuned from is not loaded"
    return {"kl": kl, "kl_base": None, "kl_base_missing": lost} if lost else {"kl": kl, "kl_base": kl_base}


def _train(run: Run, prompts: Sequence[str]) -> int:
    """Take the steps that are left, with evaluations, previews and checkpoints; return the step that was reached."""
    config, processes = run.config, run.processes
    folder = config.output_dir / "checkpoints"
    done = first = resume(run, folder)
    if first >= config.max_steps:
        say(f"{config.output_dir} is trained to step {first} already; raise max_steps to go on")
    elif first:
        say(f"continuing after step {first} of {config.max_steps}")
    preview_if_due(run, prompts, first, is_last=first >= config.max_steps or run.beyond_budget)
    with (
        interrupt.deferred() as stop,
        Tracker(config.output_dir, first + 1) if processes.is_main else nullcontext() as tracker,
        progress("train", config.max_steps, "steps", done=first) as advance,
        closing(run.reader.stream(first)) as batches,
    ):
        for step in range(first, config.max_steps):
            if run.beyond_budget:
                break
            metrics = train_step(run, step, batches)
            done = step + 1
            if step == 0:
                _check_step_zero(run, metrics)
            if run.held_out and (done % config.evaluation.every_steps == 0 or done == config.max_steps):
                with run.as_result():
                    metrics |= run.held_out.evaluate(run.model, processes)
                run.kl, run.kl_base = metrics["eval/kl"], metrics.get("eval/kl_base")
                say(f"step {done}, held-out pairs: {progress_note(metrics)}")
            if tracker is not None:
                tracker.log(done, metrics)
            for alarm in run.health.watch(metrics, relative=run.objective.loss.needs_reference):
                warn(f"step {done}: {alarm}")
            advance(1, _note(metrics))
            last = done == config.max_steps or run.beyond_budget
            signal_number = processes.highest(stop.signal_number or 0)
            if done % config.checkpointing_steps == 0 or last or signal_number:
                if tracker is not None:
                    tracker.sync()
                save(run, folder, done)
            if signal_number:
                say(f"stopped after step {done}, which is saved; the same command continues there")
                raise interrupt.Interrupted(signal_number)
            preview_if_due(run, prompts, done, is_last=last)
        if signal_number := processes.highest(stop.signal_number or 0):
            raise interrupt.Interrupted(signal_number)
    if run.beyond_budget:
        say(f"the KL divergence from the reference, {run.kl:.3g} nats, is above evaluation.max_kl: training ended")
    return done


def train_step(run: Run, step: int, batches: Iterator[Batch]) -> dict[str, float]:
    """Take one optimizer step (from 0) over the micro-batches of a global batch; return its metrics.

    With `loss.type=dpo` this descends equation 14 of Diffusion-DPO (arXiv 2311.12908): `denoising_errors` noises both
    images of a pair alike (training/errors.py) and asks policy and frozen reference, and losses/dpo.py compares them.

    Raises ConfigError, before the weights are touched, when the loss or the gradient is not finite.
    """
    import torch

    config = run.config
    for group in run.optimizer.param_groups:
        group["lr"] = config.learning_rate * min(1.0, (step + 1) / max(1, config.warmup_steps))
    run.optimizer.zero_grad(set_to_none=True)
    totals = Totals(run.processes)
    num_micro_batches = run.reader.num_micro_batches
    for number in range(num_micro_batches):
        with run.accumulating(number == num_micro_batches - 1):
            batch = next(batches).to(run.model.device)
            errors = denoising_errors(run.model, batch, reference=run.reference, baseline=run.health.baseline)
            weighted, result = run.objective(errors)
            # the gradients of several processes are averaged
            loss = (batch.weights * result.loss).sum() * run.processes.count / config.global_batch_size
            run.scaler.scale(loss).backward()
        totals.add(weighted, result, batch.weights)
    run.scaler.unscale_(run.optimizer)
    grad_norm = whole(torch.nn.utils.clip_grad_norm_(run.parameters.values(), config.max_grad_norm))
    metrics, examples = totals.fetch(grad_norm)
    refuse_not_finite(run, step, metrics, examples)
    run.scaler.step(run.optimizer)
    run.scaler.update()
    for average in (run.averaged, run.ema):
        if average is not None:
            average.update()
    return metrics | {"learning_rate": run.optimizer.param_groups[0]["lr"]}


def _check_step_zero(run: Run, metrics: Mapping[str, float]) -> None:
    """Before the first update policy and reference are one function: the cheapest detector of a wrong reference."""
    if not run.objective.loss.needs_reference:
        return
    gap = max(abs(metrics.get(name, 0.0)) for name in ("rewards/chosen", "rewards/rejected"))
    if gap > _STEP_ZERO_TOLERANCE:
        raise ConfigError(
            f"policy and reference differ before the first step (rewards of {gap:.1g} instead of 0), so that training "
            "would start from a wrong reference; with a model of your own, look at its reference(), and at dropout"
        )
    say(f"step 0: policy and reference agree (rewards within {gap:.1g}), loss {metrics['loss']:.6f}")


def _note(metrics: Mapping[str, float]) -> str:
    accuracy = metrics.get("rewards/accuracies")
    return f"loss {metrics['loss']:.4f}" + (f", accuracy {accuracy:.2f}" if accuracy is not None else "")


def _prompt_hashes(keys: np.ndarray) -> list[str]:
    """Return by what `compare` recognises the prompts that were trained on; of very many, a part that is theirs."""
    return [key_hash(key) for key in np.unique(keys)[:_MAX_PROMPT_HASHES].tolist()]


def _write_text(path: Path, text: str) -> None:
    with atomic_path(path) as partial:
        partial.write_text(text, encoding="utf-8")
