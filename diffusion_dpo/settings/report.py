"""The settings of `report`."""

from pathlib import Path

from pydantic import Field

from diffusion_dpo.config import Config


class ReportConfig(Config):
    """A training run -> report.html: what its curves say, the curves, the previews; changes nothing of the run."""

    path: Path = Path("runs/train")
    """The run folder, `output_dir` of `train`; one that is still at work will do."""
    num_previews: int = Field(24, ge=0)
    """Steps of which previews are shown, the last and then the first among them; 0 shows none."""
    output_dir: Path | None = None
    """Folder for report.html; null writes it into the run folder."""
