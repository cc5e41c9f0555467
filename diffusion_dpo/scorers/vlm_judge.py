"""A vision-language model as a judge, behind an endpoint that speaks as OpenAI's: the images of a prompt in pairs.

Such models prefer a place, often the first, whatever lies there. So every pair is asked in both orders, and only a
verdict that is the same in both counts (Zheng et al. 2023, arXiv 2306.05685); the others are no verdict.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import Field, PrivateAttr

from diffusion_dpo.config import ConfigError
from diffusion_dpo.console import say
from diffusion_dpo.scorers import Metric, Need, ScoreRequest, Scores
from diffusion_dpo.scorers.answer_log import AnswerLog
from diffusion_dpo.scorers.remote import Refused, RemoteScorer, as_png, in_parallel, quoted

if TYPE_CHECKING:
    import torch
    from PIL import Image

VERSION = 1
"""Raise it when a change of this file changes the values; the wording below decides them too."""
PAIRWISE = (
    "You compare two images, A and B, that were made for the prompt {prompt}. Criterion: {question}. Answer with one "
    'JSON object and nothing else: {{"reason": "one short sentence", "verdict": "A"}}, where the verdict is "A" or '
    '"B", whichever is better, or "tie".'
)
POINTWISE = (
    "You grade an image that was made for the prompt {prompt}. Criterion: {question}. Answer with one JSON object and "
    'nothing else: {{"reason": "one short sentence", "points": 1}}, where the points are a whole number from 1, the '
    "worst, to 10, the best."
)
_MAX_TOKENS = 512
_MAX_ANSWER_CHARACTERS = 20_000
_FILTERED = ("content_filter", "content_policy_violation")
"""How endpoints call it when they refuse an image, not the request as such."""

_VERDICTS: dict[str | None, Literal["A", "B", "tie"]] = {"A": "A", "B": "B", "tie": "tie"}

Outcome = Literal["won", "lost", "tie", "inconsistent", "unparseable"]
"""What the two answers on a pair say of one of its images."""


class VlmJudge(RemoteScorer):
    """A vision-language model that compares the images of a prompt (or, `mode: pointwise`, gives points to each).

    Known biases: it prefers a place, which is why both orders are asked, and that costs it verdicts on images that are
    much alike; counts, hands and small text escape it; images made by a model of its own kind and glossy ones please
    it more than they please people; points crowd at a few values; text in an image can tell it what to answer.
    """

    licence = "that of the model behind the endpoint"
    source = "Zheng et al. 2023, arXiv 2306.05685"
    weights = "on the server"

    url: str
    """Where the endpoint begins: `https://api.openai.com/v1`, or `http://localhost:8000/v1` for a server of yours;
    /chat/completions is asked."""
    model: str = Field(min_length=1)
    """The model's name, as the endpoint calls it."""
    mode: Literal["pairwise", "pointwise"] = "pairwise"
    """pairwise: each pair of a prompt's images is asked in both orders, and the share of won comparisons counts.
    pointwise: 1 to 10 points for each image by itself, with many ties."""
    question: str = Field("how well the image shows what the prompt says, and how well it is made", min_length=1)
    """The criterion, in words."""
    include_references: bool = False
    """Show the model the prompt's reference images, too."""
    max_rivals: int | None = Field(None, ge=2)
    """Compare each image with at most so many others of its prompt, to save requests; null compares all pairs."""
    num_parallel: int = Field(4, ge=1)
    """Requests at the same time."""
    log_path: Path = Path("runs/judge.jsonl")
    """File that every answer is appended to, as it came; what it holds is not asked again, in this run or another."""
    name: str = Field("", pattern=r"^[a-z0-9_]*$")
    """Ending of the metrics' names, so that two judges can stand side by side."""

    _log: AnswerLog | None = PrivateAttr(None)
    _asked: set[tuple[str, str]] = PrivateAttr(default_factory=set)
    """The keys of both orders of every pair so far, for `close`."""

    @property
    def lineage(self) -> frozenset[str]:
        """See Scorer: the model, whatever it is asked."""
        return frozenset({f"backbone: {self.model}"})

    @property
    def needs(self) -> frozenset[Need]:
        """The prompt; the rivals if they are compared; the references if they are shown."""
        needs: set[Need] = {"prompt"}
        if self.mode == "pairwise":
            needs.add("rivals")
        if self.include_references:
            needs.add("reference")
        return frozenset(needs)

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """`judge_win_rate`, how many comparisons it rests on, and their share of what was asked; or `judge_points`."""
        end = f"_{self.name}" if self.name else ""
        if self.mode == "pointwise":
            return (Metric(f"judge_points{end}", higher_is_better=True, range=(1.0, 10.0)),)
        return (
            Metric(f"judge_win_rate{end}", higher_is_better=True, range=(0.0, 1.0)),
            Metric(f"judge_comparisons{end}", higher_is_better=True, range=(0.0, float("inf")), auxiliary=True),
            Metric(f"judge_consistency{end}", higher_is_better=True, range=(0.0, 1.0), auxiliary=True),
        )

    def fingerprint(self) -> str:
        """Hash the model's name, the wording and what is compared; not the URL, since a server may move."""
        decides = [VERSION, self._frame(), self.max_rivals]
        return f"judge-{VERSION}-{hashlib.sha256(json.dumps(decides).encode()).hexdigest()[:16]}"

    def load(self, device: "torch.device") -> None:
        """Read the answers that are there; raises ConfigError when there is no key, or the log cannot be used."""
        super().load(device)
        self._log = AnswerLog(self.log_path)

    def score(self, batch: Sequence[ScoreRequest]) -> Scores:
        """Ask what was not asked yet, then count; raises ConfigError when the endpoint cannot be asked."""
        pngs = _Pngs()
        if self.mode == "pointwise":
            return self._points([self._ask_about(request, [request.image], pngs) for request in batch], pngs)
        compared = [self._comparisons(request, pngs) for request in batch]
        answers = self._answers([ask for pairs in compared for pair in pairs for ask in pair], pngs)
        self._asked.update((min(a.key, b.key), max(a.key, b.key)) for pairs in compared for a, b in pairs)
        verdicts = {key: parse_verdict(raw) for key, raw in answers.items()}
        outcomes = [Counter(_outcome(verdicts[a.key], verdicts[b.key]) for a, b in pairs) for pairs in compared]
        rates, counts, shares = zip(*(_tally(outcome) for outcome in outcomes), strict=True)
        names = [metric.name for metric in self.metrics]
        values = dict(zip(names, map(np.array, (rates, counts, shares)), strict=True))
        return Scores(values, tuple(_why_none(outcome) for outcome in outcomes))

    def close(self) -> None:
        """Say how often the model contradicted itself."""
        if self._log is None or not self._asked:
            return
        log = self._log
        said = Counter(_outcome(parse_verdict(log[ours]), parse_verdict(log[theirs])) for ours, theirs in self._asked)
        decided = said["won"] + said["lost"]
        say(
            f"{self.model}: of {said.total()} pairs asked in both orders, {decided} were decided, {said['tie']} ties, "
            f"{said['inconsistent']} inconsistent, {said['unparseable']} unparseable (log: {self.log_path})"
        )

    def _frame(self) -> list[Any]:
        """What every request has in common, and decides its answer."""
        wording = PAIRWISE if self.mode == "pairwise" else POINTWISE
        return [self.model, self.mode, wording, self.question, self.include_references, _MAX_TOKENS]

    def _comparisons(self, request: ScoreRequest, pngs: "_Pngs") -> list[tuple["_Ask", "_Ask"]]:
        """Return the requests about each pair of the image: with it first, and with it second."""
        ours = pngs.add(request.image)
        rivals = {pngs.add(image): image for image in request.rivals}
        rivals.pop(ours, None)
        chosen = choose_rivals(ours, sorted(rivals), self.max_rivals)
        pairs = [(request.image, rivals[rival]) for rival in chosen]
        return [(self._ask_about(request, [a, b], pngs), self._ask_about(request, [b, a], pngs)) for a, b in pairs]

    def _ask_about(self, request: ScoreRequest, images: "Sequence[Image.Image]", pngs: "_Pngs") -> "_Ask":
        shown = tuple(pngs.add(image) for image in images)
        references = tuple(pngs.add(image) for image in request.references) if self.include_references else ()
        content = json.dumps([self._frame(), request.prompt, references, shown])
        return _Ask(hashlib.sha256(content.encode()).hexdigest(), request.prompt, shown, references)

    def _answers(self, asks: "Sequence[_Ask]", pngs: "_Pngs") -> "Mapping[str, str]":
        """Return the raw answers by key, after asking for those that the log lacks, each once."""
        assert self._log is not None, "load() comes before score()"
        new = {ask.key: ask for ask in asks if ask.key not in self._log}
        in_parallel(lambda ask, stop: self._ask(ask, pngs, stop), list(new.values()), self.num_parallel)
        return {ask.key: self._log[ask.key] for ask in asks}

    def _ask(self, ask: "_Ask", pngs: "_Pngs", stop: Event) -> None:
        assert self._log is not None
        wording = PAIRWISE if self.mode == "pairwise" else POINTWISE
        text = wording.format(prompt=json.dumps(ask.prompt, ensure_ascii=False), question=self.question)
        content: list[dict[str, Any]] = [{"type": "text", "text": text}]
        labels = [f"Reference {i + 1}:" for i in range(len(ask.references))]
        labels += ["Image A:", "Image B:"] if self.mode == "pairwise" else ["The image:"]
        for label, digest in zip(labels, (*ask.references, *ask.images), strict=True):
            content += [{"type": "text", "text": label}, {"type": "image_url", "image_url": {"url": pngs.uri(digest)}}]
        messages = [{"role": "user", "content": content}]
        body = {"model": self.model, "temperature": 0, "max_tokens": _MAX_TOKENS, "messages": messages}
        url = f"{self.url.rstrip('/')}/chat/completions"
        try:
            raw = _content(url, self.post(url, body, stop))
        except Refused as error:
            if not any(code in error.answer for code in _FILTERED):
                raise
            raw = error.answer
        parsed = parse_verdict(raw) if self.mode == "pairwise" else parse_points(raw)
        about = {"model": self.model, "prompt": ask.prompt, "images": " ".join(ask.images), "parsed": str(parsed)}
        self._log.add(ask.key, raw, about)

    def _points(self, asks: "Sequence[_Ask]", pngs: "_Pngs") -> Scores:
        answers = self._answers(asks, pngs)
        points = [parse_points(answers[ask.key]) for ask in asks]
        values = np.array([np.nan if one is None else float(one) for one in points])
        reasons = [
            f"unparseable: {quoted(answers[ask.key])[:80] or 'an empty answer'}" if one is None else ""
            for ask, one in zip(asks, points, strict=True)
        ]
        return Scores({self.metrics[0].name: values}, tuple(reasons))


@dataclass(frozen=True)
class _Ask:
    """One request: what is shown, by hashes of the pixels, in order. `key` stands for all that decides the answer."""

    key: str
    prompt: str
    images: tuple[str, ...]
    references: tuple[str, ...]


class _Pngs:
    """The images of a batch by a hash of their pixels; each is encoded once, and only if it is sent."""

    def __init__(self) -> None:
        self._digests: dict[int, str] = {}
        self._images: dict[str, Image.Image] = {}
        self._encoded: dict[str, str] = {}

    def add(self, image: "Image.Image") -> str:
        if id(image) not in self._digests:
            content = f"{image.size} ".encode() + image.tobytes()
            self._digests[id(image)] = hashlib.sha256(content).hexdigest()[:32]
            self._images[self._digests[id(image)]] = image
        return self._digests[id(image)]

    def uri(self, digest: str) -> str:
        if digest not in self._encoded:
            self._encoded[digest] = f"data:image/png;base64,{as_png(self._images[digest])}"
        return self._encoded[digest]


def choose_rivals(ours: str, others: Sequence[str], limit: int | None) -> list[str]:
    """Return whom an image is compared with: at most `limit` others, such that each has us among its own, too.

    All images of the prompt lie on a ring, sorted by their hashes; each is compared with those up to limit / 2 places
    away, and for an odd limit with the one opposite, where the ring has an even number.
    """
    ring = sorted({ours, *others})
    size, place = len(ring), ring.index(ours)
    if limit is None or limit >= size - 1:
        steps = set(range(1, size))
    else:
        steps = {step % size for near in range(1, limit // 2 + 1) for step in (near, -near)}
        if limit % 2 and size % 2 == 0:
            steps.add(size // 2)
    return [ring[(place + step) % size] for step in sorted(steps)]


def parse_verdict(text: str) -> Literal["A", "B", "tie"] | None:
    """Return the verdict of the JSON object in an answer; None without one, with two that differ, or in free prose."""
    found = {value.strip() if isinstance(value, str) else None for value in _fields(text, "verdict")}
    return _VERDICTS.get(found.pop()) if len(found) == 1 else None


def parse_points(text: str) -> int | None:
    """Return the points, 1 to 10, of the JSON object in an answer; None where there are none, or several."""
    found = list(_fields(text, "points"))
    if len(found) == 1 and isinstance(found[0], int) and not isinstance(found[0], bool) and 1 <= found[0] <= 10:
        return found[0]
    return None


def _fields(text: str, name: str) -> Iterator[Any]:
    """Yield the values of a key in all JSON objects that stand in a text, in a code fence or between words, say."""
    if len(text) > _MAX_ANSWER_CHARACTERS:
        return
    decoder, start = json.JSONDecoder(), text.find("{")
    while start >= 0:
        try:
            found, end = decoder.raw_decode(text, start)
        except (ValueError, RecursionError):
            end = start + 1
        else:
            if name in found:
                yield found[name]
        start = text.find("{", end)


def _content(url: str, answer: Any) -> str:
    """Return the text of a chat completion; what the model refuses to say is a text that holds no verdict."""
    try:
        message = answer["choices"][0]["message"]
        text = message.get("content")
        if text is None:
            text = message.get("refusal") or ""
    except (LookupError, TypeError, AttributeError):
        text = None
    if not isinstance(text, str):
        shown = json.dumps(answer)[:200]
        raise ConfigError(f"{url} does not answer as /chat/completions does, but {shown}; see that `url` is right")
    return text


def _outcome(first: str | None, second: str | None) -> Outcome:
    """Say what became of an image, from the verdict where it was A and the one where it was B."""
    if first is None or second is None:
        return "unparseable"
    outcomes: dict[tuple[str, str], Outcome] = {("A", "B"): "won", ("B", "A"): "lost", ("tie", "tie"): "tie"}
    return outcomes.get((first, second), "inconsistent")


def _tally(outcomes: "Counter[Outcome]") -> tuple[float, float, float]:
    """Return the share of won comparisons (a tie is half of one), their number, and their share of what was asked.

    Only consistent ones count; NaN where there are none, or where nothing was asked.
    """
    consistent = outcomes["won"] + outcomes["lost"] + outcomes["tie"]
    rate = (outcomes["won"] + outcomes["tie"] / 2) / consistent if consistent else np.nan
    return rate, float(consistent), consistent / outcomes.total() if outcomes else np.nan


def _why_none(outcomes: "Counter[Outcome]") -> str:
    if not outcomes:
        return "its prompt has no other image"
    bad = [f"{outcomes[kind]} {kind}" for kind in ("inconsistent", "unparseable") if outcomes[kind]]
    return "" if sum(outcomes[kind] for kind in ("won", "lost", "tie")) else f"no consistent verdict: {', '.join(bad)}"
