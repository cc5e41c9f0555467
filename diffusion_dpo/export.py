"""`export`: preference pairs for other trainers, or a tuned model for other programs."""

from pathlib import Path

from diffusion_dpo.exporting.adapter import export_adapter
from diffusion_dpo.exporting.pairs import export_pairs
from diffusion_dpo.settings import ExportConfig
from diffusion_dpo.settings.sharing import PAIR_FORMATS


def run(config: ExportConfig) -> Path:
    """Write the files that are not there yet; return their folder."""
    return export_pairs(config) if config.format in PAIR_FORMATS else export_adapter(config)
