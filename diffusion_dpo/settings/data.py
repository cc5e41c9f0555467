"""The settings of the verbs that make, look at and pass on data."""

from pathlib import Path
from typing import Literal

from pydantic import Field

from diffusion_dpo.config import Config, plugin
from diffusion_dpo.settings.common import Device, ImageModel, Precision, Sampling


class Variant(Config):
    """One way to draw of a mixture; what it does not say is that of the run."""

    name: str | None = None
    """What its images' `origin` calls it; null takes its number."""
    model: ImageModel | None = None
    """The model that draws."""
    scheduler: Literal["ddim", "dpm++", "euler", "euler_ancestral", "unipc"] | None = None
    """The sampler, on the noise schedule of the model; null takes the model's own."""
    num_inference_steps: int | None = Field(None, ge=1)
    """Denoising steps per image."""
    guidance_scale: float | None = Field(None, ge=0)
    """Classifier-free guidance."""
    negative_prompt: str | None = None
    """What the guidance pushes away from."""
    strength: float | None = Field(None, gt=0, le=1)
    """How far its images leave the reference."""


class GenerateConfig(Config):
    """Prompts -> candidates: several images for every prompt."""

    prompts_path: Path | None = None
    """Prompts: .txt (one a line), .json, .tsv or .jsonl with `prompt` and optionally `id`, `category`, `references`;
    or the name of a suite: parti, geneval, hpsv2, pocket (held-out captions). Null takes pocket prompts."""
    num_prompts: int | None = Field(None, ge=1)
    """Use only the first N prompts; null uses all (64 of the pocket world when there is no file)."""
    num_images_per_prompt: int = Field(4, ge=1)
    """Candidates drawn for each prompt."""
    model: ImageModel = ImageModel()
    """The model that draws."""
    sampling: Sampling = Sampling()
    """How it draws."""
    strength: float | None = Field(None, gt=0, le=1)
    """Start from the prompt's first reference at this part of the noise schedule; null starts from pure noise."""
    mixture: tuple[Variant, ...] = ()
    """Several ways to draw; image k of a prompt is drawn by variant k mod their number. Empty draws all alike."""
    seed: int = Field(0, ge=0, lt=2**63)
    """Base seed; an image's own seed comes from (seed, prompt id, index)."""
    device: Device = "auto"
    """Where to compute; auto takes cuda, then mps, then cpu."""
    mixed_precision: Precision = "auto"
    """Number format of the model; auto is bf16 or fp16 on cuda, fp32 elsewhere."""
    shard_size: int = Field(64, ge=1)
    """Images per Parquet file; a crash loses at most one file."""
    output_dir: Path = Path("runs/candidates")
    """Folder for the candidates; the same command again continues there."""


class ScoreConfig(Config):
    """Candidates -> scores, beside the candidates."""

    path: Path = Path("runs/candidates")
    """A candidates folder, any Parquet file with an `image` column, or a folder of image files: with captions beside
    them, with a metadata.jsonl or .csv, or as A1111, Forge, ComfyUI and others saved them, prompts inside."""
    prompt_column: str | None = None
    """Column of Parquet, or key of a folder's metadata, that holds the prompts; null takes prompt, text or caption."""
    scorers: list[plugin("scorers")] = ["clip"]  # type: ignore[valid-type]
    """The judges."""
    batch_size: int = Field(64, ge=1)
    """Images judged at once."""
    device: Device = "auto"
    """Where to compute; auto takes cuda, then mps, then cpu."""
    batch_timeout_seconds: float | None = Field(1800.0, gt=0)
    """Give up when a judge says nothing about a batch for so long; null waits for ever."""
    max_broken_share: float = Field(0.05, ge=0, le=1)
    """Stop when more than this share of the images cannot be read, lacks the prompt that a judge needs, or makes it
    fail. One image without a prompt never stops it, unless this is 0."""
    output_dir: Path | None = None
    """Folder for the scores; null puts them beside the candidates."""


class PairConfig(Config):
    """Scored candidates -> preference pairs."""

    path: Path = Path("runs/candidates")
    """Scored candidates: what was given to `score`."""
    prompt_column: str | None = None
    """Column of Parquet, or key of a folder's metadata, that holds the prompts; null takes prompt, text or caption."""
    scores_dir: Path | None = None
    """Folder with the scores; null looks beside the candidates."""
    metric: str | None = None
    """The metric that decides, for strategies that go by one; null takes the only main metric there is."""
    higher_is_better: bool | None = None
    """Direction of the metric; null takes what its scorer says."""
    strategy: plugin("strategies") = "best_worst"  # type: ignore[valid-type]
    """Which images of a prompt become pairs."""
    missing: Literal["drop", "lose"] = "drop"
    """What becomes of an image without a score that the strategy looks at. drop: it is in no pair. lose: it may be
    rejected, as the worst there is; for judges that find nothing to judge where an image is wrong, a face say."""
    min_margin: float = Field(0.0, ge=0)
    """Drop pairs whose margin is below this, in the unit of what decides; equal scores are always dropped."""
    min_margin_norm: float = Field(0.0, ge=0)
    """The same in units of the spread that the scores have within a prompt, over all prompts; of weighted sums, which
    are normalised already, the same as min_margin."""
    max_pairs_per_prompt: int | None = Field(None, ge=1)
    """Keep at most N pairs of a prompt, those with the largest margin."""
    max_pairs_per_image: int | None = Field(None, ge=1)
    """Keep at most N pairs of a prompt with the same image, those with the largest margin."""
    label_temperature: float | None = Field(None, gt=0)
    """Soft labels: the probability that chosen is better is sigmoid(margin_norm / this), as of Bradley and Terry;
    null: 1."""
    test_share: float = Field(0.0, ge=0, lt=1)
    """Share of the prompts whose pairs go to a folder of their own, `<output_dir>-test`, and never into training."""
    shuffle_labels: bool = False
    """A control: swap chosen and rejected at random. What a model learns from such pairs, it did not learn from the
    labels."""
    audit: int = Field(0, ge=0)
    """Also write a blind sheet of N pairs, `audit.html`, on which a person checks the labels by eye."""
    seed: int = Field(0, ge=0, lt=2**63)
    """Decides which prompts are held out, which labels are swapped, and which pairs are on the blind sheet."""
    output_dir: Path = Path("runs/pairs")
    """Folder for the pairs."""


class InspectConfig(Config):
    """What is in a dataset or candidates folder; never modifies anything there."""

    path: Path = Path("runs/pairs")
    """A folder of pairs or candidates, a Parquet file, a folder with metadata.jsonl, or a folder of images."""
    data: plugin("data", otherwise="auto") | None = None  # type: ignore[valid-type]
    """Pairs as `train` takes them, instead of `path`; settings of `data` without a path or type go with `path`."""
    prompt_column: str | None = None
    """Column of Parquet, or key of a folder's metadata, that holds the prompts; null takes prompt, text or caption."""
    num_images: int = Field(24, ge=0)
    """Images on the page and on the contact sheet; of pairs, those with the widest and the narrowest margins."""
    output_dir: Path | None = None
    """Folder for the page and the contact sheet; null writes it to runs/inspect/<name>."""
