"""The model card: what was tuned, on what, judged by whom, with which result, and how to load it.

Text that comes from elsewhere (prompts, paths, names) is escaped, so that it can neither break the page nor its front
matter. The same run gives the same card.
"""

import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import yaml
from pydantic import ValidationError

from diffusion_dpo import __version__, registry
from diffusion_dpo.card.public import HUB_ID, public_base, public_data
from diffusion_dpo.card.results import Results
from diffusion_dpo.config import ForeignPlugin
from diffusion_dpo.models import DiffusionModel
from diffusion_dpo.models.lora_layers import DEFAULT_RANK
from diffusion_dpo.models.pipeline import POCKET_DIR
from diffusion_dpo.report import MetricResult
from diffusion_dpo.settings import TrainConfig

_SPECIAL = re.compile(r"([\\`*_{}\[\]()<>#+!|~$&])")
_ARXIV = re.compile(r"\b(\d{4}\.\d{5})\b")
_LICENCES = {
    "CompVis/stable-diffusion-v1-4": "creativeml-openrail-m",
    "pocket": "apache-2.0",
    "runwayml/stable-diffusion-v1-5": "creativeml-openrail-m",
    "stabilityai/stable-diffusion-2-1": "openrail++",
    "stabilityai/stable-diffusion-xl-base-1.0": "openrail++",
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "creativeml-openrail-m",
}
"""Licences of well-known bases, which what is tuned from them inherits."""
_CITATION = """```bibtex
@article{wallace2023diffusion,
  title   = {Diffusion Model Alignment Using Direct Preference Optimization},
  author  = {Wallace, Bram and Dang, Meihua and Rafailov, Rafael and Zhou, Linqi and Lou, Aaron and Purushwalkam,
             Senthil and Ermon, Stefano and Xiong, Caiming and Joty, Shafiq and Naik, Nikhil},
  journal = {arXiv preprint arXiv:2311.12908},
  year    = {2023}
}
```"""


@dataclass(frozen=True)
class Shown:
    """What of a run is there to be loaded, and from where."""

    kind: str
    """`adapter`, a LoRA, or `unet`."""
    repo_id: str | None = None
    """Where it is on the hub; None in the run folder."""
    kohya_file: str | None = None
    """The file in kohya's names beside it."""
    previews: Sequence[str] = ()
    """Paths of images that the tuned model drew."""


def card_text(
    config: TrainConfig,
    facts: Mapping[str, Any],
    shown: Shown,
    *,
    results: Results | None = None,
    next_command: str | None = None,
) -> str:
    """Return the card as Markdown with YAML front matter; `facts` are those of the run's manifest."""
    base = public_base(config, facts)
    is_lora = shown.kind == "adapter"
    name = config.output_dir.name if shown.repo_id is None else shown.repo_id.rpartition("/")[2]
    what = "a LoRA of it" if is_lora else "its UNet, fully fine-tuned"
    sections = [
        _front_matter(config, base, shown, is_lora=is_lora),
        f"# {plain(name)}",
        f"{plain(base)}, tuned on {facts['num_pairs']} rows of preference data with {config.loss.type} ({what}) by "
        f"diffusion-dpo {__version__}.",
        _how_to_load(config, base, shown),
        _previews(shown),
        _results(results, next_command),
        _data(config, facts),
        _settings(config, facts),
        _limits(facts),
        _citation(config),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def plain(text: object) -> str:
    """Return text as one line in which Markdown and HTML find nothing to interpret."""
    line = " ".join("".join(letter if letter.isprintable() else " " for letter in str(text)).split())
    return _SPECIAL.sub(r"\\\1", line)


def _front_matter(config: TrainConfig, base: str, shown: Shown, *, is_lora: bool) -> str:
    entries: dict[str, Any] = {"library_name": "diffusers", "pipeline_tag": "text-to-image"}
    if base in _LICENCES:
        entries["license"] = _LICENCES[base]
    if HUB_ID.fullmatch(base):
        entries["base_model"] = base
        entries["base_model_relation"] = "adapter" if is_lora else "finetune"
    kind = "lora" if is_lora else "full-fine-tuning"
    entries["tags"] = ["text-to-image", "stable-diffusion", "diffusion-dpo", str(config.loss.type), kind]
    prompts = config.preview.prompts if config.preview else ()
    if shown.previews and prompts:
        entries["widget"] = [
            {"text": prompt, "output": {"url": url}} for prompt, url in zip(prompts, shown.previews, strict=False)
        ]
    return f"---\n{yaml.safe_dump(entries, sort_keys=False, allow_unicode=False)}---"


def _how_to_load(config: TrainConfig, base: str, shown: Shown) -> str:
    usage = _usage(config, base, shown)
    if not usage:
        return ""
    prompts = config.preview.prompts if config.preview else ()
    image = f"image = pipe({(prompts or ('your prompt',))[0]!r}).images[0]"
    text = f"## How to load it\n\nIn diffusers:\n\n```python\n{usage}\n{image}\n```"
    if shown.kohya_file is not None:
        stem = shown.kohya_file.removesuffix(".safetensors")
        text += (
            f"\n\nIn ComfyUI, put `{shown.kohya_file}` into `models/loras` and add a node *Load LoRA* at strength 1. "
            f"In A1111 and Forge, put it into `models/Lora` and write `<lora:{stem}:1>` into the prompt. The file "
            f"holds its alpha: 1 is the strength that was trained. It is meant for {plain(base)}."
        )
    elif shown.repo_id is None and shown.kind == "adapter":
        text += "\n\nFor ComfyUI, A1111 and Forge, `diffusion-dpo export format=kohya` makes a file of this."
    return text


def _usage(config: TrainConfig, base: str, shown: Shown) -> str:
    """Return Python that loads the result; without paths of this machine where it is meant for others."""
    if isinstance(config.model, ForeignPlugin):
        return ""
    model = cast(DiffusionModel, config.model)
    if shown.repo_id is None:
        return model.usage(shown.kind)
    if "pretrained" in type(model).model_fields:
        model = model.model_copy(update={"pretrained": base})
    usage = model.usage(shown.kind)
    where = f"{shown.repo_id!r}" if shown.kind == "adapter" else f"{shown.repo_id!r}, subfolder='unet'"
    usage = usage.replace(f"({shown.kind!r})", f"({where})")
    pocket = repr(str(POCKET_DIR))
    return (
        f"from diffusion_dpo.models.pipeline import POCKET_DIR\n{usage.replace(pocket, 'POCKET_DIR')}"
        if (pocket in usage)
        else usage
    )


def _previews(shown: Shown) -> str:
    if not shown.previews:
        return ""
    images = " ".join(f"![drawn by the tuned model]({url})" for url in shown.previews)
    return f"## Images\n\nDrawn by the tuned model at the end of training; not selected.\n\n{images}"


def _results(results: Results | None, next_command: str | None) -> str:
    if results is None or not results.metrics:
        command = f" `{next_command.replace('`', '')}` measures it." if next_command else ""
        return f"## Results\n\nNot measured yet: nothing here says that the images became better.{command}"
    report = results.report
    against = "another adapter of the base" if report.baseline.adapter else "the base"
    rows = "\n".join(map(_row, results.metrics))
    return f"""## Results

Against {against}, on {report.num_prompts} prompts x {report.seeds_per_prompt} seeds with the same noise; 95 %
intervals over prompts. A metric that labelled the training pairs is expected to rise; the held-out ones are the
evidence.

| metric | role | win rate | mean difference | p (Holm) |
|---|---|---|---|---|
{rows}"""


def _row(result: MetricResult) -> str:
    def cell(value: float | None, interval: tuple[float, float] | None, form: str) -> str:
        if value is None:
            return "not measured"
        between = "" if interval is None else f" ({interval[0]:{form}} to {interval[1]:{form}})"
        return f"{value:{form}}{between}"

    p = "" if result.p_holm is None else f"{result.p_holm:.2g}"
    role = plain(result.role.replace("_", " "))
    wins = cell(result.win_rate, result.win_rate_interval, ".1%")
    difference = cell(result.mean_difference, result.mean_difference_interval, "+.4g")
    return f"| {plain(result.name)} | {role} | {wins} | {difference} | {p} |"


def _data(config: TrainConfig, facts: Mapping[str, Any]) -> str:
    name = public_data(config, facts)
    named = f" ({plain(name)})" if name else ""
    lines = [
        f"{facts['num_pairs']} rows, of type {plain(config.data.type)}{named}, and {facts['num_held_out']} held out.",
        *(f"Left out: {count} {plain(reason)}." for reason, count in sorted(facts.get("drops", {}).items())),
    ]
    if facts.get("start"):
        lines.append(f"Trained on from {plain(facts['start'])}, whose judges are among these.")
    labelled_by = facts.get("labelled_by") or ()
    if not labelled_by:
        lines.append("Labelled by their source.")
    else:
        lines.append("Labelled by:\n")
        lines += [f"- {plain(metric)}, licence: {plain(_licence_of(str(metric)))}" for metric in labelled_by]
    return "## Data\n\n" + "\n".join(lines)


def _licence_of(metric: str) -> str:
    """Return the licence of the scorer that gives a metric with its default settings."""
    for name in registry.TABLES["scorers"]:
        try:
            scorer = registry.resolve("scorers", name)(type=name)
        except ValidationError:
            continue  # it has settings without a default, so that its metrics are not known
        if any(metric == found.name for found in scorer.metrics):
            return str(scorer.licence)
    return "not known; ask whoever made the labels"


def _settings(config: TrainConfig, facts: Mapping[str, Any]) -> str:
    loss = config.loss.model_dump()
    model = config.model.model_dump()
    lora = {**model["lora"], "rank": lora_rank(model)} if model.get("lora") else {}
    rows = {
        "objective": ", ".join(f"{key}={value}" for key, value in loss.items()),
        "steps": f"{facts['steps']} of {config.global_batch_size}",
        "learning rate": f"{config.learning_rate:g}",
        "LoRA": ", ".join(f"{key}={value}" for key, value in lora.items() if value is not None)
        or "none: all of the UNet",
        "seed": config.seed,
    }
    table = "\n".join(f"| {key} | {plain(value)} |" for key, value in rows.items())
    return f"## Training\n\n| setting | value |\n|---|---|\n{table}"


def lora_rank(model: Mapping[str, Any]) -> str:
    """Return the rank of the LoRA that a model's settings train, in words."""
    rank = model["lora"].get("rank")
    return str(rank or ("that of its start" if model.get("adapter_path") else DEFAULT_RANK))


def _limits(facts: Mapping[str, Any]) -> str:
    text = (
        "The model keeps what its base cannot do, and its biases. It follows the preferences in its data, and nobody "
        "else's. It was tuned for the base named above; on another one its effect is not known."
    )
    if facts.get("labelled_by"):
        text += " A scorer is not a person: it has tastes and blind spots, and training finds them."
    return f"## Limits\n\n{text}"


def _citation(config: TrainConfig) -> str:
    is_foreign = isinstance(config.loss, ForeignPlugin)
    words = "" if is_foreign else (sys.modules[type(config.loss).__module__].__doc__ or "").strip()
    found = _ARXIV.search(words)
    objective = ""
    if found and found[1] != "2311.12908":
        title = re.sub(r"\s*\(?(?:arXiv )?\d{4}\.\d{5}\)?", "", " ".join(words.split("\n\n")[0].split())).rstrip(". ")
        objective = f"\n\nThe objective: {plain(title)}, [arXiv {found[1]}](https://arxiv.org/abs/{found[1]})."
    return f"## Citation\n\n{_CITATION}{objective}"
