"""The settings of `label`."""

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from diffusion_dpo.config import Config, plugin

_LOCAL = ("127.0.0.1", "localhost", "::1")


class LabelConfig(Config):
    """A web page where people choose between two images, blind -> votes, and preference pairs of them."""

    path: Path = Path("runs/candidates")
    """Candidates, pairs, or the folder of a comparison: what `inspect` and `compare` know."""
    data: plugin("data", otherwise="auto") | None = None  # type: ignore[valid-type]
    """Pairs as `train` takes them, instead of `path`; settings of `data` without a path or type go with `path`."""
    prompt_column: str | None = None
    """Of candidates: column of Parquet, or key of a folder's metadata, that holds the prompts; null takes
    prompt, text or caption."""
    pairs_per_prompt: int = Field(2, ge=1)
    """Of candidates: pairs that are made of a prompt's images; every image is used about equally often."""
    max_pairs: int | None = Field(None, ge=1)
    """Ask about at most so many pairs, drawn at random; null asks about all."""
    votes_per_pair: int = Field(1, ge=1)
    """Raters that every pair is shown to."""
    repeat_share: float = Field(0.05, ge=0, le=1)
    """Share of the pairs that a rater sees twice, the second time with the sides swapped."""
    checks_share: float = Field(0.0, ge=0, le=1)
    """Attention checks, an image beside a ruined copy of itself, for each pair; 0 shows none."""
    lease_seconds: float = Field(300.0, gt=0)
    """A pair that one rater has before them is kept from the others for so long."""
    labels: Literal["majority", "soft"] = "majority"
    """The pairs that are made. majority: what most chose, an even split being dropped. soft: with the share of votes
    as the probability. Ties and `both bad` make no pair."""
    seed: int = Field(0, ge=0, lt=2**63)
    """Decides the order, the sides, and what is repeated."""
    host: str = "127.0.0.1"
    """Address to listen at; one that others can reach needs a token of your own."""
    port: int = Field(8321, ge=0, le=65535)
    """Port to listen at; 0 takes a free one."""
    token: str | None = Field(None, min_length=16, pattern=r"^[A-Za-z0-9_-]+$")
    """What the address must carry; null makes a new one at every start."""
    output_dir: Path = Path("runs/label")
    """Folder for the votes and the pairs; the same command again goes on there."""

    @model_validator(mode="after")
    def _public_needs_a_token(self) -> Self:
        if self.host not in _LOCAL and self.token is None:
            raise ValueError(
                f"host={self.host} can be reached by others, who could vote and see the images; set token to 16 "
                "letters or more of your own, or leave host at 127.0.0.1"
            )
        return self
