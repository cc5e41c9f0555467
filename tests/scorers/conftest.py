"""Small models that several tests of scorers share."""

from pathlib import Path

import pytest

from tests.scorers.tiny_clip import make_clip


@pytest.fixture(scope="session")
def clip_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny CLIP, for `model: local-dir:...`."""
    return make_clip(tmp_path_factory.mktemp("clip"))
