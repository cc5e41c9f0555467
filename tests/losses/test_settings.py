"""The settings of every objective: the default that its paper or code has, and the values at which a setting ends."""

import pytest
from pydantic import ValidationError

from diffusion_dpo import registry

TINY = 1e-9
BETA = (2000.0, [0.0], [TINY])
SETTINGS = {
    "capo": {"beta": BETA, "temperature": (0.1, [0.0], [TINY])},
    "dco": {"beta": BETA},
    "dmpo": {"beta": BETA, "smoothing": (0.01, [0.0, 0.5], [TINY, 0.5 - TINY])},
    "dpo": {"beta": BETA, "label_smoothing": (0.0, [-TINY, 0.5], [0.0, 0.5 - TINY])},
    "dpo_shift": {"beta": BETA, "rejected_weight": (0.95, [0.0, 1 + TINY], [TINY, 1.0])},
    "hinge": {"beta": BETA},
    "ipo": {"beta": BETA},
    "kto": {
        "beta": (10000.0, [0.0], [TINY]),
        "desirable_weight": (1.0, [0.0], [TINY]),
        "undesirable_weight": (1.0, [0.0], [TINY]),
    },
    "linear_dpo": {
        "beta": (100.0, [0.0], [TINY]),
        "eta": (0.001, [-TINY, 0.5], [0.0, 0.5 - TINY]),
        "maximum": (1.0, [0.5], [0.5 + TINY]),
    },
    "mapo": {"beta": (None, [0.0], [TINY, None])},
    "plackett_luce": {"beta": BETA, "list_size": (4, [1], [2])},
    "rank_dpo": {"beta": BETA, "list_size": (4, [1], [2])},
    "robust_dpo": {"beta": BETA, "flip_rate": (0.1, [-TINY, 0.5], [0.0, 0.5 - TINY])},
    "sft": {},
}
"""Of every setting: its default, values that are refused, and the last ones that are not."""


@pytest.mark.parametrize("name", registry.TABLES["losses"])
def test_defaults_and_ends_are_those_of_the_table(name: str):
    kind = registry.resolve("losses", name)
    assert set(kind.model_fields) - {"type"} == set(SETTINGS[name])
    for setting, (default, refused, accepted) in SETTINGS[name].items():
        assert getattr(kind(), setting) == default
        for value in accepted:
            assert getattr(kind(**{setting: value}), setting) == value
        for value in refused:
            with pytest.raises(ValidationError, match=setting):
                kind(**{setting: value})
