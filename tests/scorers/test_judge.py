"""The framework around a scorer: it believes nothing, and survives a full device."""

import re
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import PrivateAttr

from diffusion_dpo.config import ConfigError
from diffusion_dpo.scorers import Metric, Scorer, ScoreRequest, Scores
from diffusion_dpo.scorers.judge import FAILED, Judge, ScorerContractError, check_metrics, judge

REQUESTS = [ScoreRequest(Image.new("RGB", (32, 32), (i, i, i))) for i in range(10)]


class Gray(Scorer):
    """The red value of an image as a share of 255; `spoil` damages the answer, `capacity` is the device's memory."""

    licence = "none"
    type: str = "gray"
    name: str = "gray"
    capacity: int = 100
    _spoil: Callable[[np.ndarray], Scores] | None = PrivateAttr(None)
    _batches: list[int] = PrivateAttr(default_factory=list)

    @property
    def metrics(self) -> tuple[Metric, ...]:
        return (Metric(self.name, higher_is_better=True, range=(0.0, 1.0)),)

    def score(self, batch: Sequence[ScoreRequest]) -> Scores:
        if len(batch) > self.capacity:
            raise torch.OutOfMemoryError("out of memory")
        self._batches.append(len(batch))
        values = np.array([request.image.getpixel((0, 0))[0] / 255 for request in batch])
        return self._spoil(values) if self._spoil else Scores({self.name: values})


def test_batches_are_joined_in_order() -> None:
    scorer, done = Gray(), []
    scores = judge(scorer, REQUESTS, batch_size=4, advance=done.append)
    np.testing.assert_allclose(scores.values["gray"], np.arange(10) / 255)
    assert scorer._batches == [4, 4, 2]
    assert sum(done) == 10


def test_equal_requests_are_judged_once_and_still_counted() -> None:
    scorer, done = Gray(), []
    scores = Judge(scorer, batch_size=8).score([*REQUESTS[:3], *REQUESTS[:3]], advance=done.append)
    assert scorer._batches == [3]
    assert sum(done) == 6
    np.testing.assert_allclose(scores.values["gray"] * 255, [0, 1, 2, 0, 1, 2])


def test_only_wholly_equal_requests_are_one() -> None:
    """A pixel anywhere, the prompt, a reference or a rival may be the difference."""
    plain = Image.new("RGB", (200, 200))
    other = plain.copy()
    other.putpixel((121, 77), (0, 0, 1))
    requests = [
        ScoreRequest(plain),
        ScoreRequest(other),
        ScoreRequest(plain.resize((100, 400))),
        ScoreRequest(plain, "a prompt"),
        ScoreRequest(plain, references=(plain,)),
        ScoreRequest(plain, references=(other,)),
        ScoreRequest(plain, rivals=(plain,)),
        ScoreRequest(plain, rivals=(other,)),
    ]
    scorer = Gray()
    Judge(scorer, batch_size=16).score([*requests, *(replace(r, image=r.image.copy()) for r in requests)])
    assert scorer._batches == [len(requests)]


def test_pixels_are_hashed_only_where_a_few_of_them_are_equal(monkeypatch: pytest.MonkeyPatch) -> None:
    """To hash a whole image takes longer than some judges do."""
    hashed: list[Image.Image] = []
    monkeypatch.setattr("diffusion_dpo.scorers.judge._digest", lambda image: hashed.append(image) or b"")
    Judge(Gray(), batch_size=16).score([*REQUESTS, REQUESTS[0]])
    assert hashed == [REQUESTS[0].image] * 2


def test_no_requests() -> None:
    scores = judge(Gray(), [], batch_size=4)
    assert scores.values["gray"].shape == (0,)


def test_halves_the_batch_when_memory_is_short_and_remembers_it(capsys: pytest.CaptureFixture[str]) -> None:
    scorer = Gray(capacity=3)
    worker = Judge(scorer, batch_size=8)
    np.testing.assert_allclose(worker.score(REQUESTS).values["gray"], np.arange(10) / 255)
    worker.score(REQUESTS)
    assert max(scorer._batches) == 2
    assert capsys.readouterr().out.count("out of memory") == 2  # 8 -> 4 -> 2, and never again


def test_gives_up_when_one_image_does_not_fit() -> None:
    with pytest.raises(ConfigError, match="gray needs more memory"):
        judge(Gray(capacity=0), REQUESTS, batch_size=4)


@pytest.mark.parametrize(
    "spoil, complaint",
    [
        (lambda v: Scores({}), "returned \\[\\]"),
        (lambda v: Scores({"gray": v, "extra": v}), "extra"),
        (lambda v: Scores({"gray": v[:-1]}), "shape"),
        (lambda v: Scores({"gray": v[:, None]}), "shape"),
        (lambda v: Scores({"gray": v.tolist()}), "float array, not list"),
        (lambda v: Scores({"gray": v.astype(np.int64)}), "float array, not int64"),
        (lambda v: Scores({"gray": v + np.inf}), "infinite"),
        (lambda v: Scores({"gray": v * np.nan}), "NaN without a reason"),
        (lambda v: Scores({"gray": v * np.nan}, ("why",)), "1 reasons for 4 images"),
        (lambda v: Scores({"gray": v + 1.01}), "outside its range"),
        (lambda v: Scores({"gray": v - 1}), "outside its range"),
    ],
)
def test_a_wrong_answer_names_scorer_and_metric(spoil: Callable[[np.ndarray], Scores], complaint: str) -> None:
    scorer = Gray()
    scorer._spoil = spoil
    with pytest.raises(ScorerContractError, match=f"gray.*{complaint}"):
        judge(scorer, REQUESTS[:4], batch_size=4)


def test_rounding_may_leave_the_range_and_float32_will_do() -> None:
    scorer = Gray()
    scorer._spoil = lambda v: Scores({"gray": (1 + v * 1e-6).astype(np.float32)})
    assert judge(scorer, REQUESTS, batch_size=4).values["gray"].dtype == np.float64


def test_warns_of_a_constant_metric(capsys: pytest.CaptureFixture[str]) -> None:
    scorer = Gray()
    judge(scorer, REQUESTS, batch_size=4)
    assert "cannot tell" not in capsys.readouterr().out
    scorer._spoil = lambda v: Scores({"gray": np.full_like(v, 0.5)})
    judge(scorer, REQUESTS, batch_size=4)
    assert "gray is 0.5 for all 10 images" in capsys.readouterr().out


def test_metrics_must_be_distinct_and_fit_in_file_names() -> None:
    check_metrics([Gray(), Gray(name="gray_2")])
    with pytest.raises(ConfigError, match="both give the metric 'gray'"):
        check_metrics([Gray(), Gray()])
    with pytest.raises(ConfigError, match=r"'\.\./x'"):
        check_metrics([Gray(name="../x")])
    with pytest.raises(ConfigError, match="scorers is empty"):
        check_metrics([])


class Moody(Gray):
    """Raises on images as light as `bad`; sleeps on them instead if `slow`."""

    bad: tuple[int, ...] = ()
    slow: bool = False

    def score(self, batch: Sequence[ScoreRequest]) -> Scores:
        if any(request.image.getpixel((0, 0))[0] in self.bad for request in batch):
            if self.slow:
                time.sleep(5)
            raise KeyError("no such\nface")
        return super().score(batch)


def test_one_odd_image_does_not_cost_the_others() -> None:
    scores = judge(Moody(bad=(3, 9)), REQUESTS, batch_size=4)
    assert np.isnan(scores.values["gray"]).nonzero()[0].tolist() == [3, 9]
    assert re.match(rf"{FAILED}KeyError: 'no such..face' .test_judge.py line \d+", scores.reasons[3])
    assert not any(reason for i, reason in enumerate(scores.reasons) if i not in (3, 9))


@pytest.mark.parametrize("batch_size", [1, 4])
def test_a_scorer_that_always_raises_is_one_sentence(batch_size: int) -> None:
    with pytest.raises(ConfigError, match=r"moody fails on every image: KeyError.*\(test_judge\.py line \d+\)"):
        judge(Moody(type="moody", bad=tuple(range(10))), REQUESTS, batch_size=batch_size)


def test_a_scorer_that_hangs_is_given_up() -> None:
    began = time.monotonic()
    with pytest.raises(ConfigError, match=r"gave no answer on 4 images within batch_timeout_seconds=0\.2"):
        Judge(Moody(bad=(3,), slow=True), batch_size=4, timeout_seconds=0.2).score(REQUESTS)
    assert time.monotonic() - began < 3
    assert signal.getsignal(signal.SIGALRM) == signal.SIG_DFL
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)


def test_what_has_answered_once_fails_for_the_sake_of_the_image() -> None:
    everything = tuple(range(10))
    scores = Judge(Moody(bad=everything), batch_size=4, has_answered=True).score(REQUESTS)
    assert np.isnan(scores.values["gray"]).all()
    assert np.isnan(judge(Moody(bad=everything), REQUESTS[:3], batch_size=2).values["gray"]).all(), "three say little"


class Stubborn(Gray):
    """Catches whatever it can, and goes on."""

    def score(self, batch: Sequence[ScoreRequest]) -> Scores:
        for _ in range(50):
            try:
                time.sleep(0.1)
            except Exception:  # noqa: BLE001
                pass
        return super().score(batch)


def test_a_scorer_cannot_swallow_the_deadline() -> None:
    began = time.monotonic()
    with pytest.raises(ConfigError, match="gave no answer"):
        Judge(Stubborn(), batch_size=4, timeout_seconds=0.3).score(REQUESTS)
    assert time.monotonic() - began < 3


def test_a_reason_is_text() -> None:
    scorer = Gray()
    scorer._spoil = lambda v: Scores({"gray": v}, (None,) * len(v))  # type: ignore[arg-type]
    with pytest.raises(ScorerContractError, match="a reason that is no text"):
        judge(scorer, REQUESTS, batch_size=4)
