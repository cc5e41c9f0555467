"""`compare`: any number of models on the same prompts, seeds and noise -> images, scores, report.json, report.html.

What is there already is not made again: a model, a judge or a seed that is added draws and judges only what is new.
"""

import hashlib
import json
import shlex
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from diffusion_dpo.card import write_environment
from diffusion_dpo.card.public import scrub
from diffusion_dpo.comparing import Compared, Wall
from diffusion_dpo.comparing.drawing import draw_all
from diffusion_dpo.comparing.judging import Distances, judge, judge_shares, refuse_unusable
from diffusion_dpo.comparing.lineup import implicit_accuracy, line_up, num_trained_on
from diffusion_dpo.comparing.openable import refuse_unopenable
from diffusion_dpo.comparing.people import votes_as_scores
from diffusion_dpo.comparing.roles import refuse_unknown, roles_of
from diffusion_dpo.config import command, dump
from diffusion_dpo.console import say, show, warn
from diffusion_dpo.data.prompts import Prompt, read_prompts, refuse_foreign_defaults
from diffusion_dpo.data.votes import read_votes
from diffusion_dpo.device import pick_device, pick_dtype
from diffusion_dpo.files import atomic_path, claim, finish, shown
from diffusion_dpo.pocket.world import is_held_out, parse_caption
from diffusion_dpo.processes import Processes
from diffusion_dpo.report import BASELINE, Gallery, MetricScores, ModelFacts, Pair, Report, Sign, signs, words
from diffusion_dpo.report.html import write_report
from diffusion_dpo.report.statistics import METHODS, prompts_needed, summarise_all
from diffusion_dpo.sampling import identity_of, image_seed
from diffusion_dpo.settings import CompareConfig

if TYPE_CHECKING:
    import torch

_LAYOUT = 2
"""Of what a comparison is known by; a folder of another one is not continued."""
WIN_RATES = (0.55, 0.6, 0.7)
"""The report says how many prompts would show these."""


def run(config: CompareConfig) -> Path:
    """Draw and judge what is missing, then write the report; return the path of report.html."""
    refuse_foreign_defaults(config.prompts_path, *_pretrained(config))
    prompts = read_prompts(config.prompts_path, limit=config.num_prompts, held_out=True)
    refuse_unusable(config, prompts)
    refuse_unknown(config)
    votes = read_votes(config.human) if config.human is not None else []
    processes = Processes.join(config.device)
    if processes.is_main:
        refuse_unopenable(config)
    device = pick_device(config.device)
    dtype = pick_dtype(config.mixed_precision, device)
    identity = _identity(config, prompts, dtype)
    way_on = "choose another output_dir; models, judges and seeds can be added to the folder as they are"
    if not processes.is_main:
        processes.wait()  # until the main process has taken the folder
    with claim(config.output_dir, "compare", identity, way_on=way_on) if processes.is_main else nullcontext():
        if processes.is_main:
            with atomic_path(config.output_dir / "config.yaml") as partial:
                partial.write_text(dump(config), encoding="utf-8")
            write_environment(config.output_dir / "environment.json")
            processes.wait()
        lineup = line_up(config, processes)
        _announce(config, lineup, prompts, device, identity)
        wall = draw_all(config, lineup, prompts, device, dtype, processes)
        if processes.count > 1:
            judge_shares(config, wall, processes)
        if processes.is_main:
            scores, distances = judge(config, wall, roles_of(config, lineup))
            if config.human is not None:
                scores += votes_as_scores(votes, wall, config.human)
            report = _report(config, lineup, wall, scores, distances, device, identity)
            write_report(config.output_dir, report, scores, _gallery(config, wall), embed=config.embed_images)
            shards = {
                name: [str((unit.root / unit.files[0]).relative_to(config.output_dir)) for unit in units]
                for name, units in wall.units.items()
            }
            finish(config.output_dir, "compare", identity, num_prompts=len(prompts), shards=shards)
    processes.leave()
    page = config.output_dir / "report.html"
    if processes.is_main:
        _tell(report)
        say(f"numbers: {page.with_name('report.json')}\nreport: {page}")
        say(f"judge them yourself, blind: {command('label', {'path': config.output_dir})}")
        say(f"next: open {page} in a browser")
    return page


def _pretrained(config: CompareConfig) -> Iterator[str]:
    yield from dict.fromkeys(model.pretrained for model in (config.baseline, *config.models.values()))


def _identity(config: CompareConfig, prompts: Sequence[Prompt], dtype: "torch.dtype") -> dict[str, Any]:
    """What makes it this comparison and no other: models, judges and seeds may be added."""
    decisive = config.model_dump(mode="json", include={"sampling", "seed"})
    contents = [(p.id, p.text, [hashlib.sha256(data).hexdigest() for data in p.references]) for p in prompts]
    digest = hashlib.sha256(json.dumps(contents).encode()).hexdigest()[:16]
    return decisive | {
        "baseline": identity_of(config.baseline),
        "prompts": digest,
        "precision": str(dtype).removeprefix("torch."),
        "layout": _LAYOUT,
    }


def _announce(
    config: CompareConfig,
    lineup: Sequence[Compared],
    prompts: Sequence[Prompt],
    device: "torch.device",
    identity: dict[str, Any],
) -> None:
    names = "; ".join(f"{compared.name}: {compared.description}" for compared in lineup)
    say(
        f"compare: {len(prompts)} prompts x {config.seeds_per_prompt} seeds x {len(lineup)} models, on {device.type} "
        f"in {identity['precision']}; {names}"
    )


# --- the report ------------------------------------------------------------------------------------------------------


def _report(
    config: CompareConfig,
    lineup: Sequence[Compared],
    wall: Wall,
    scores: Sequence[MetricScores],
    distances: Distances | None,
    device: "torch.device",
    identity: dict[str, Any],
) -> Report:
    categories = [prompt.category for prompt in wall.prompts]
    facts = [
        ModelFacts(
            name=compared.name,
            description=compared.description,
            weights=compared.weights,
            adapter=compared.adapter,
            adapter_scale=compared.model.adapter_scale,
            labelled_by=compared.labelled_by,
            judges_not_known=compared.judges_not_known,
            num_prompts_trained_on=num_trained_on(compared, wall.prompts),
        )
        for compared in lineup
    ]
    report = Report(
        prompt_set="held-out prompts" if all(map(_is_held_out, wall.prompts)) else "prompts",
        num_prompts=len(wall.prompts),
        seeds_per_prompt=wall.num_seeds,
        categories={name: categories.count(name) for name in dict.fromkeys(categories) if name},
        baseline=facts[0],
        models=tuple(facts[1:]),
        results=tuple(summarise_all(scores, categories)),
        methods=METHODS,
        made_with={
            "command": shlex.join(["diffusion-dpo", "compare", f"{shown(config.output_dir)}/config.yaml"]),
            **{name: value for name, value in identity.items() if name != "layout"},
            "models": {compared.name: scrub(compared.model.model_dump(mode="json")) for compared in lineup},
            "device": device.type,
            "scorers": {scorer.metrics[0].name: scorer.fingerprint() for scorer in config.scorers},
            "versions": json.loads((config.output_dir / "environment.json").read_text(encoding="utf-8")),
        },
    )
    spread = words.headline(report).win_rate_std
    return report.model_copy(
        update={
            "signs": tuple(_signs(config, report, lineup, wall, scores, distances)),
            "prompts_needed": {f"{rate:g}": prompts_needed(rate, spread) for rate in WIN_RATES},
        }
    )


def _signs(
    config: CompareConfig,
    report: Report,
    lineup: Sequence[Compared],
    wall: Wall,
    scores: Sequence[MetricScores],
    distances: Distances | None,
) -> Iterator[Sign]:
    by_name = {metric.name: metric for metric in scores}
    diverse = config.diversity.metrics[-1].name if config.diversity is not None else ""
    uids = {name: [it.uid for unit in units for it in unit.read(images=False)] for name, units in wall.units.items()}
    for compared in lineup[1:]:
        results = report.of(compared.name)
        yield from signs.trained_on_only(results)
        if distances is not None:
            moved = distances.models[compared.name]
            is_same = uids[compared.name] == uids[BASELINE]
            yield signs.distance(compared.name, distances.name, moved, distances.yardstick, is_same=is_same)
        for result in results:
            if result.name == diverse:
                yield signs.diversity(result)
            if result.name in signs.APPEARANCE:
                yield signs.appearance(by_name[result.name], result)
        accuracy = implicit_accuracy(compared)
        if accuracy is not None:
            yield signs.implicit_accuracy(compared.name, accuracy)


def _is_held_out(prompt: Prompt) -> bool:
    """Whether a prompt is known to be held out: it is a caption of the pocket world's held-out tenth."""
    scene = parse_caption(prompt.text)
    return scene is not None and is_held_out(scene)


def _gallery(config: CompareConfig, wall: Wall) -> Gallery:
    """Give the report access to the images, of which it reads only those that it shows."""
    per_seed = {name: len(units) // wall.num_seeds for name, units in wall.units.items()}

    def read(pairs: Sequence[Pair]) -> dict[Pair, dict[str, bytes]]:
        found: dict[Pair, dict[str, bytes]] = {pair: {} for pair in pairs}
        for name, units in wall.units.items():
            for index in sorted({pair.seed for pair in pairs}):
                position = 0
                for unit in units[index * per_seed[name] : (index + 1) * per_seed[name]]:
                    here = range(position, position + unit.num_images)
                    position = here.stop
                    if any(pair.seed == index and pair.prompt in here for pair in pairs):
                        for prompt, candidate in zip(here, unit.read(), strict=True):
                            if Pair(prompt, index) in found:
                                found[Pair(prompt, index)][name] = candidate.data
        return found

    return Gallery(
        prompts=[prompt.text for prompt in wall.prompts],
        categories=[prompt.category for prompt in wall.prompts],
        seeds=[
            [image_seed(config.seed, prompt.id, index) for index in range(wall.num_seeds)] for prompt in wall.prompts
        ],
        read=read,
    )


def _tell(report: Report) -> None:
    several = len(report.models) > 1
    table = Table(box=None, pad_edge=False, padding=(0, 1 if several else 2, 0, 0))
    for heading in (*(["model"] if several else []), "metric"):
        table.add_column(heading, no_wrap=True)
    value = "model" if several else report.models[0].name
    for heading in ("baseline", value, "difference, 95 % interval", "win rate"):
        table.add_column(heading, justify="right", no_wrap=True)
    roles: set[str] = set()
    for model in report.models:
        for result in sorted(report.of(model.name), key=words.rank):
            if result.auxiliary and (several or result.name in signs.APPEARANCE):
                continue
            places = words.places_of(result)
            roles.add(result.role)
            table.add_row(
                *([model.name] if several else []),
                result.name + " *" * (result.role == "trained_on") + " +" * (result.role == "related"),
                words.number(result.mean_baseline, places),
                words.number(result.mean, places),
                f"{words.number(result.mean_difference, places, signed=True)}, {words.interval(result)}",
                words.percent(result.win_rate),
            )
    show(table)
    if "trained_on" in roles:
        say("* labelled the training pairs, or is given by the scorer that did; the others are held out")
    if "related" in roles:
        say("+ has the backbone or the data of a judge that labelled the training pairs, or the data of these")
    say(words.sentence(report, words.headline(report)))
    for caution in words.cautions(report):
        warn(caution)
