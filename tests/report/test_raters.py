"""Agreement against examples that were worked out by hand or published."""

import pytest

from diffusion_dpo.report.raters import (
    cohen_kappa,
    krippendorff_alpha,
    left_share,
    longest_streak,
    percent_agreement,
)


def test_kappa_of_fifty_grant_applications() -> None:
    """20 yes by both, 5 and 10 by one only, 15 no by both: observed 0.7, by chance 0.5."""
    first = ["y"] * 25 + ["n"] * 25
    second = ["y"] * 20 + ["n"] * 5 + ["y"] * 10 + ["n"] * 15
    assert cohen_kappa(first, second) == pytest.approx(0.4)
    assert cohen_kappa(second, first) == cohen_kappa(first, second)
    assert cohen_kappa(first, first) == 1
    assert cohen_kappa(["y"], ["y"]) is None and cohen_kappa([], []) is None


def test_alpha_of_krippendorffs_example_with_gaps() -> None:
    """Krippendorff, Computing Krippendorff's Alpha-Reliability (2011), example C: four observers, 12 units, 0.743."""
    rows = [
        ["1", "2", "3", "3", "2", "1", "4", "1", "2", ".", ".", "."],
        ["1", "2", "3", "3", "2", "2", "4", "1", "2", "5", ".", "3"],
        [".", "3", "3", "3", "2", "3", "4", "2", "2", "5", "1", "."],
        ["1", "2", "3", "3", "2", "4", "4", "1", "2", "5", "1", "."],
    ]
    units = [{str(i): row[u] for i, row in enumerate(rows) if row[u] != "."} for u in range(12)]
    assert krippendorff_alpha(units) == pytest.approx(0.743, abs=5e-4)
    assert krippendorff_alpha([{"a": "1", "b": "1"}]) is None
    assert krippendorff_alpha([{"a": "1"}]) is None


def test_percent_agreement_counts_pairs_of_raters() -> None:
    assert percent_agreement([{"a": "x", "b": "x", "c": "y"}, {"a": "x"}]) == (1 / 3, 3)
    assert percent_agreement([{"a": "x"}]) is None


def test_left_share_leaves_ties_out_and_has_wilsons_interval() -> None:
    found = left_share(["left"] * 15 + ["right"] * 5 + ["tie"] * 7)
    assert found is not None
    share, (low, high), amount = found
    assert (share, amount) == (0.75, 20) and low == pytest.approx(0.531, abs=1e-3) and high < 0.9
    assert left_share(["tie"]) is None


def test_streaks() -> None:
    assert longest_streak("aabbbca") == 3 and longest_streak("") == 0
