"""A single-file checkpoint as users of plain diffusers load it, with the settings of the base that it was made of."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from diffusion_dpo.config import ConfigError
from diffusion_dpo.exporting.source import Base
from diffusion_dpo.models.base import read_base
from diffusion_dpo.models.checkpoint_file import find_checkpoint, write_settings
from diffusion_dpo.models.lora_file import PARTS
from diffusion_dpo.models.pipeline import POCKET_DIR, first_sentence
from diffusion_dpo.models.quiet import quiet

if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline


def load_single_file(
    family: type["DiffusionPipeline"], file: Path, base: Base, device: "torch.device"
) -> "DiffusionPipeline":
    """Load a checkpoint in the original layout, of a family and with the settings of a base, in float32.

    Raises ConfigError when diffusers cannot, or leaves weights out.
    """
    import torch
    from safetensors import SafetensorError

    try:
        with quiet(), _settings_folder(base) as folder:
            loaded = family.from_single_file(str(file), config=folder, local_files_only=True, dtype=torch.float32)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, AttributeError, SafetensorError) as error:
        raise ConfigError(f"diffusers cannot load {file} as a {family.__name__}: {first_sentence(error)}") from error
    parts = {part: loaded.components[part] for part in ("vae", *PARTS) if part in loaded.components}
    lost = [f"{part}.{name}" for part, it in parts.items() for name, value in it.named_parameters() if value.is_meta]
    if lost:  # such as of two text encoders of one width, which it does not tell apart
        raise ConfigError(f"diffusers does not find all weights of {file}: {len(lost)} are left out, e.g. {lost[0]}")
    loaded.set_progress_bar_config(disable=True)
    return loaded.to(device)


@contextmanager
def _settings_folder(base: Base) -> Iterator[str]:
    """Yield the folder of the base's settings, with which a single-file checkpoint is read."""
    from huggingface_hub import snapshot_download

    if base.pretrained == "pocket":
        yield str(POCKET_DIR)
    elif find_checkpoint(base.pretrained) is not None:
        with tempfile.TemporaryDirectory() as folder:
            write_settings(read_base(base.pretrained, prediction_type=base.prediction_type), Path(folder))
            yield folder
    elif Path(base.pretrained).is_dir():
        yield base.pretrained
    else:
        yield str(snapshot_download(base.pretrained, revision=base.revision, local_files_only=True))
