"""What preference pairs hold: counts, scores, repeats, prompts that dominate, and what predicts the labels."""

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from diffusion_dpo.config import command
from diffusion_dpo.data import PairSource, PreferencePair
from diffusion_dpo.data.collect import AGAIN, BOTH_DIRECTIONS, SAME_IMAGE, survey
from diffusion_dpo.data.contact_sheet import GREEN, GREY, RED, Block, Tile
from diffusion_dpo.data.images import decode_rgb
from diffusion_dpo.data.index import Collected, PairRecord
from diffusion_dpo.data.labelled import LabelledData
from diffusion_dpo.report.agreement import agreement
from diffusion_dpo.report.appearance import Appearance, look_at, near_duplicates
from diffusion_dpo.report.confounds import (
    Predictor,
    category,
    few_values,
    number,
    origin_keys,
    origin_text,
    together,
)
from diffusion_dpo.report.data_page import (
    BETWEEN,
    Findings,
    PromptShare,
    Scores,
    Sheet,
    blank_text,
    describe_predictor,
    describe_tau,
    drop_rows,
    kept,
    score_text,
    sizes,
    spread,
    spread_evenly,
)
from diffusion_dpo.report.prompt_warnings import prompt_warnings
from diffusion_dpo.report.words import count, percent, shorten
from diffusion_dpo.settings import TrainConfig

_SIDES = ("chosen", "rejected")
_FACE_AREA = "face_area"
_ENOUGH_PROMPTS = 20
"""With fewer, even a number that decides three labels of four would mostly go unnoticed."""
_ADVICE = (
    "a model that is tuned on these pairs may learn that rather than what you prefer: balance the pairs, or judge by "
    "something that does not follow it"
)
_BROKEN: float = TrainConfig.model_fields["max_broken_share"].default
_TOP_PROMPTS = 5
_LARGE_SHARE, _TOP_SHARE, _MIN_PROMPTS = 0.1, 0.5, 100
"""A prompt with more of the pairs, or one per cent of at least so many prompts with more of them, is warned of."""


class _Looks(NamedTuple):
    """What is kept of a pair beside its record: how its two images look, and how they came about."""

    images: tuple[Appearance | None, Appearance | None]
    origins: tuple[dict[str, Any], dict[str, Any]]


def look_at_pairs(path: Path, source: PairSource, num_images: int) -> Findings:
    """Look at every pair of a source once, and at those that are shown a second time."""
    looks: dict[int, _Looks] = {}

    def look(row: int, pair: PreferencePair, images: tuple[Image.Image | None, Image.Image | None]) -> None:
        seen = [
            look_at(it, data) if it else None for it, data in zip(images, (pair.chosen, pair.rejected), strict=True)
        ]
        looks[row] = _Looks((seen[0], seen[1]), (pair.chosen_origin, pair.rejected_origin))

    found = survey(_with_ties(source), look=look)
    records = list(found.records)
    metrics = sorted({name for it in records for scores in (it.chosen_scores, it.rejected_scores) for name in scores})
    decided = [it for it in records if it.is_pair and it.label_prob != 0.5]
    groups: dict[str, list[PairRecord]] = defaultdict(list)
    for record in records:
        groups[record.prompt].append(record)
    labelled_by = source.labelled_by()
    confounds, judges = _predictors(decided, looks, metrics, labelled_by)
    named = [name for name in metrics if not name.endswith(_FACE_AREA)]
    taus = agreement(map(_scores_of_images, groups.values()), named, lower_is_better=frozenset())
    top = _top_prompts(groups)
    repeats, warnings = _repeats(found, groups, looks)
    loud = [it for it in confounds if it.is_loud]
    untold = [f"{it.sentence}; under so few prompts that may be chance" for it in confounds if it.is_untold]
    loud_ones = [*(it.sentence for it in loud), *([_ADVICE] if loud else [])]
    places = {prompt: group[0].where for prompt, group in groups.items()}
    warnings = [*loud_ones, *untold, *warnings, *_dominance(groups, top), *prompt_warnings(places)]
    if records and found.broken_share > _BROKEN:
        refused = f"{percent(found.broken_share)} of the rows are broken, and training takes {percent(_BROKEN)}"
        warnings.append(f"{refused}: fix them, or raise max_broken_share")
    return Findings(
        headline=_headline(records, groups, loud, len({it.prompt for it in decided})),
        tiles=_tiles(found, records, groups),
        rows=tuple(
            _counts(source, found, records)
            + _score_rows(records, metrics)
            + repeats
            + [(f"label from {it.name}", describe_predictor(it)) for it in (*confounds, *judges) if it.varies]
            + [(f"tau of {tau.first}, {tau.second}", describe_tau(tau)) for tau in taus if tau.num_prompts]
            + drop_rows(found.dropped)
        ),
        warnings=tuple(warnings),
        dropped=found.dropped,
        next_command=_next_command(path, source, found.broken_share) if records else "",
        sheets=tuple(_sheets(found, records, num_images // 2)),
        scores=tuple(Scores(name, *(_scores(records, side, name) for side in _SIDES)) for name in metrics),
        confounds=tuple(confounds),
        judges=tuple(judges),
        taus=tuple(taus),
        top_prompts=top,
    )


def _with_ties(source: PairSource) -> PairSource:
    """Return the source with its ties, which are counted here, unless somebody asked for something else."""
    unasked = "ties" in type(source).model_fields and "ties" not in source.model_fields_set
    return source.model_copy(update={"ties": "keep"}) if unasked else source


def _next_command(path: Path, source: PairSource, broken_share: float) -> str:
    settings = source.model_dump(mode="json", exclude_defaults=True)
    settings.setdefault("path", str(path))
    if source.type == "pairs":
        del settings["type"]
    more: dict[str, Any] = {"loss.type": "kto"} if isinstance(source, LabelledData) else {}
    if broken_share > _BROKEN:
        more["max_broken_share"] = math.ceil(100 * broken_share) / 100
    return command("train", {f"data.{name}": value for name, value in settings.items()} | more)


# --- what predicts the label -----------------------------------------------------------------------------------------


def _predictors(
    decided: Sequence[PairRecord], looks: dict[int, _Looks], metrics: Sequence[str], labelled_by: Sequence[str]
) -> tuple[list[Predictor], list[Predictor]]:
    """Return what should not predict the label, the best predictor first, and what the judges say of it."""
    if not decided:
        return [], []
    codes = {prompt: code for code, prompt in enumerate(dict.fromkeys(it.prompt for it in decided))}
    prompts = np.array([codes[it.prompt] for it in decided])
    seen = [[it for row in decided if (it := looks[row.row].images[side])] for side in (0, 1)]
    origins = [[looks[it.row].origins[side] for it in decided] for side in (0, 1)]
    numbers = [[it.numbers for it in side] for side in seen]
    confounds = [
        number(name, [np.array([it[name] for it in side]) for side in numbers], prompts) for name in numbers[0][0]
    ]
    confounds.append(category("file format", [[it.format for it in side] for side in seen], prompts))
    for key, is_category in origin_keys(it for side in origins for it in side).items():
        values = [[it.get(key) for it in side] for side in origins]
        name = f"{key.replace('_', ' ')} (origin)"
        if is_category:
            texts = [[None if it is None else origin_text(it) for it in side] for side in values]
            confounds.append(category(name, few_values(texts), prompts))
        else:
            confounds.append(number(name, [np.array(side, dtype=float) for side in values], prompts))
    faces = [name for name in metrics if name.endswith(_FACE_AREA)]
    scored = {name: number(name, [_scores(decided, side, name) for side in _SIDES], prompts) for name in metrics}
    confounds += [scored[name] for name in faces]
    seen_already = {*faces, *numbers[0][0]}
    judges = [scored[name] for name in metrics if name not in seen_already]
    confounds, judges = (
        together([replace(it, labelled=it.name in labelled_by) for it in part]) for part in (confounds, judges)
    )
    return sorted(confounds, key=lambda it: -abs((0.5 if it.auc is None else it.auc) - 0.5)), judges


# --- repeats and prompts ---------------------------------------------------------------------------------------------


def _repeats(
    found: Collected, groups: dict[str, list[PairRecord]], looks: dict[int, _Looks]
) -> tuple[list[tuple[str, str]], list[str]]:
    """Return lines on contradictions, duplicates and blank images, and what to warn of."""
    drops = found.drops
    near_pairs = near_images = num_images = 0
    blank: Counter[str] = Counter()
    for records in groups.values():
        distinct: dict[str, Appearance] = {}
        for record in records:
            images = looks[record.row].images
            cells = [it.cells for it in images if it]
            near_pairs += near_duplicates(cells)
            for side, uid, it in zip(_SIDES, (record.chosen_uid, record.rejected_uid), images, strict=True):
                if it:
                    distinct[uid] = it
                    blank[side] += it.is_blank
        blank["images"] += sum(it.is_blank for it in distinct.values())
        num_images += len(distinct)
        near_images += near_duplicates([it.cells for it in distinct.values()])
    rows = [
        ("contradictions", _left_out(drops.get(BOTH_DIRECTIONS, 0))),
        ("same pair again", _left_out(drops.get(AGAIN, 0))),
        ("same image on both sides", _left_out(drops.get(SAME_IMAGE, 0))),
        ("nearly the same on both sides", f"{near_pairs} of {count(len(found), 'pairs')}" if near_pairs else "0"),
        ("nearly the same image again", f"{near_images} of {count(num_images, 'images')} (under the same prompt)"),
        ("blank images", blank_text(blank["images"], num_images)),
    ]
    warnings = []
    if blank["chosen"]:
        warnings.append(
            f"a blank image is chosen in {count(blank['chosen'], 'pairs')}; no judge should prefer one: look at them"
        )
    if near_pairs > _LARGE_SHARE * len(found):
        warnings.append(
            f"the two images of {percent(near_pairs / len(found))} of the pairs are nearly the same: such labels are "
            "mostly noise; draw more different images, or raise min_margin"
        )
    return rows, warnings


def _left_out(rows: int) -> str:
    return f"{count(rows, 'rows')}, left out" if rows else "0"


def _top_prompts(groups: dict[str, list[PairRecord]]) -> tuple[PromptShare, ...]:
    """Return the prompts with most rows."""
    total = sum(map(len, groups.values()))
    ranked = sorted(groups, key=lambda prompt: -len(groups[prompt]))[:_TOP_PROMPTS]
    return tuple(PromptShare(it, len(groups[it]), len(groups[it]) / total) for it in ranked)


def _dominance(groups: dict[str, list[PairRecord]], top: Sequence[PromptShare]) -> list[str]:
    """Say which prompts have more than their part of the pairs."""
    warnings = [
        f"one prompt has {percent(it.share)} of all rows ({shorten(it.prompt, 60)}); lower max_pairs_per_prompt"
        for it in top
        if it.share > max(_LARGE_SHARE, 2 / len(groups))
    ]
    counts = sorted(map(len, groups.values()), reverse=True)
    few = -(-len(counts) // 100)
    if len(counts) >= _MIN_PROMPTS and sum(counts[:few]) >= _TOP_SHARE * sum(counts):
        share = percent(sum(counts[:few]) / sum(counts))
        warnings.append(f"{few} of {len(counts)} prompts have {share} of all rows; lower max_pairs_per_prompt")
    return warnings


# --- words -----------------------------------------------------------------------------------------------------------


def _headline(
    records: Sequence[PairRecord], groups: dict[str, list[PairRecord]], loud: Sequence[Predictor], num_decided: int
) -> str:
    """Say the worst that was found; `num_decided` prompts have pairs that are no ties."""
    if not records:
        return "No row can be used."
    if loud:
        names = [it.name.removesuffix(" (origin)") for it in loud]
        listed = names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
        return f"{listed[0].upper()}{listed[1:]} {'predicts' if len(names) == 1 else 'predict'} which image is chosen."
    kind = "pairs" if records[0].is_pair else "labelled images"
    held = f"{count(len(records), kind)} under {count(len(groups), 'prompts')}"
    if num_decided == 0:
        return f"{held}."
    enough = num_decided >= _ENOUGH_PROMPTS
    return f"{held}; {'nothing simple predicts' if enough else 'too few to tell what predicts'} the labels."


def _tiles(
    found: Collected, records: Sequence[PairRecord], groups: dict[str, list[PairRecord]]
) -> tuple[tuple[str, str], ...]:
    ties = sum(it.label_prob == 0.5 for it in records)
    kind = "Pairs" if any(it.is_pair for it in records) else "Images"
    return (
        (kind, f"{len(records):,}"),
        ("Prompts", f"{len(groups):,}"),
        ("Dropped", f"{len(found.dropped):,}"),
        ("Ties", f"{ties:,}"),
    )


def _counts(source: PairSource, found: Collected, records: Sequence[PairRecord]) -> list[tuple[str, str]]:
    prompts = [it.prompt for it in records]
    num_pairs = sum(it.is_pair for it in records)
    sizes_px = (size for it in records for size in (it.chosen_size_px, it.rejected_size_px) if any(size))
    return [
        ("kind", f"{source.noun} (data.type={source.type})"),
        ("rows", str(len(records) + len(found.dropped))),
        *(("left out", line) for line in source.left_out()),
        ("pairs", str(num_pairs) if num_pairs or not records else ""),
        ("liked images", str(sum(bool(it.chosen_uid) for it in records)) if records and not num_pairs else ""),
        ("disliked images", str(sum(bool(it.rejected_uid) for it in records)) if records and not num_pairs else ""),
        ("ties", str(sum(it.label_prob == 0.5 for it in records))),
        ("prompts", f"{len(set(prompts))} different; words: {spread(len(prompt.split()) for prompt in prompts)}"),
        ("image sizes", sizes(sizes_px)),
        ("label probability", spread(it.label_prob for it in records)),
        ("margin", spread(it.margin for it in records if it.margin is not None)),
    ]


def _score_rows(records: Sequence[PairRecord], metrics: Sequence[str]) -> list[tuple[str, str]]:
    return [(f"{name}, {side}", spread(_scores(records, side, name).tolist())) for name in metrics for side in _SIDES]


def _scores(records: Sequence[PairRecord], side: str, metric: str) -> np.ndarray:
    """Return a metric's values on one side, (num_records,), NaN where there is none."""
    return np.array([getattr(it, f"{side}_scores").get(metric, math.nan) for it in records], dtype=float)


def _scores_of_images(records: Iterable[PairRecord]) -> list[dict[str, float]]:
    """Return the scores of the distinct images of one prompt's pairs."""
    images: dict[str, dict[str, float]] = {}
    for it in records:
        images |= {it.chosen_uid: it.chosen_scores, it.rejected_uid: it.rejected_scores}
    return [scores for uid, scores in images.items() if uid]


# --- images ----------------------------------------------------------------------------------------------------------


def _sheets(found: Collected, records: Sequence[PairRecord], amount: int) -> list[Sheet]:
    """Return the pairs of the widest and narrowest margins; without margins, pairs spread evenly over the data."""
    ranked = sorted((it for it in records if it.margin is not None and math.isfinite(it.margin)), key=_margin)
    if not ranked:
        shown = {"Examples": spread_evenly(records, amount)}
    else:
        amount = min(amount, len(ranked))
        shown = {
            "Widest margins": ranked[::-1][: amount - amount // 2],
            "Narrowest margins": ranked[: amount // 2],
        }
    wanted = {it.row for part in shown.values() for it in part}
    pairs = iter(found) if wanted else iter(())
    blocks = {it.row: _block(pair) for it, pair in zip(records, pairs) if it.row in wanted}  # noqa: B905
    return [Sheet(title, [blocks[it.row] for it in part]) for title, part in shown.items() if part]


def _margin(record: PairRecord) -> float:
    assert record.margin is not None
    return record.margin


def _block(pair: PreferencePair) -> Block:
    """Return a pair to be shown: chosen on the left with a green edge, rejected with a red one, grey for ties."""
    is_tie = pair.label_prob == 0.5
    sides = (
        ("tie" if is_tie else "chosen", pair.chosen, pair.chosen_scores, GREY if is_tie else GREEN),
        ("tie" if is_tie else "rejected", pair.rejected, pair.rejected_scores, GREY if is_tie else RED),
    )
    tiles = [
        Tile(kept(decode_rgb(data)), BETWEEN.join(filter(None, [name, score_text(scores)])), edge)
        for name, data, scores, edge in sides
        if data
    ]
    return Block(pair.prompt, tuple(tiles), "" if pair.margin is None else f"margin {pair.margin:.3g}")
