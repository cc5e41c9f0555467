"""Where the files of a CLIP are: in the package, in a folder, on the hub, behind an open_clip tag; or who has them."""

import difflib
from pathlib import Path

from diffusion_dpo.config import ConfigError
from diffusion_dpo.console import say
from diffusion_dpo.scorers.weights import Weights, files_of, revision_of

POCKET_DIR = Path(__file__).parents[1] / "pocket" / "weights" / "clip"
LOCAL, HUB = "local-dir:", "hf-hub:"
_CONFIG, _WEIGHTS = "open_clip_config.json", "open_clip_model.safetensors"
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pth")


def is_self_contained(model: str) -> bool:
    """Whether `model` brings its weights: the pocket CLIP, a folder, a hub id; not the name of an architecture."""
    return model == "pocket" or model.startswith((LOCAL, HUB))


def locate(scorer: str, model: str, pretrained: str | None, revision: str | None) -> list[Path]:
    """Return the files that hold the model, downloading those of a hub id or a tag if need be.

    Those of what is self-contained, tokenizer and all, lie in one folder, which open_clip loads by its `local-dir:`.
    Raises ConfigError, saying which file is missing, where to get it and where to put it.
    """
    if model == "pocket":
        if not (POCKET_DIR / _WEIGHTS).is_file():
            raise ConfigError(
                f"scorer {scorer}: this installation lacks {POCKET_DIR / _WEIGHTS}; install the package again, or "
                "make the file with scripts/train_pocket.py"
            )
        return files_of(POCKET_DIR)
    if model.startswith(LOCAL):
        return _local_files(scorer, Path(model.removeprefix(LOCAL)).expanduser())
    if model.startswith(HUB):
        return _hub_files(scorer, model.removeprefix(HUB), revision)
    assert pretrained is not None, "an architecture name comes with pretrained"
    return [_pretrained_file(scorer, model, pretrained)]


def _local_files(scorer: str, folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise ConfigError(f"scorer {scorer}: there is no folder {folder}; model={LOCAL}... needs one with {_CONFIG}")
    files = files_of(folder)
    if not any(file.name == _CONFIG for file in files):
        raise ConfigError(
            f"scorer {scorer}: {folder} lacks {_CONFIG}; download it with the weights from a model page that lists "
            "the library OpenCLIP on https://huggingface.co into that folder"
        )
    if not any(file.suffix in _WEIGHT_SUFFIXES for file in files):
        raise ConfigError(
            f"scorer {scorer}: {folder} has {_CONFIG} but no weights; download {_WEIGHTS} from the same model page "
            "into that folder"
        )
    return files


def _hub_files(scorer: str, repository: str, revision: str | None) -> list[Path]:
    weights = Weights(scorer, repository, revision, f"https://huggingface.co/{repository}", "see that page")
    files = weights.snapshot("open_clip")
    if not any(file.suffix in _WEIGHT_SUFFIXES for file in files):
        raise weights.missing(f"{repository} has no {_WEIGHTS}", f"a folder, and set model to {LOCAL}<folder>")
    return files


def check_architecture(name: str) -> None:
    """Raise ConfigError, with the nearest right name, for an architecture that open_clip does not have."""
    import open_clip

    known = open_clip.list_models()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
        raise ConfigError(f"open_clip has no architecture {name!r}. Did you mean {near[0]!r}?")


def preprocessing(architecture: str, pretrained: str) -> str:
    """Say how open_clip prepares images for the weights of a tag; the same for every file that is given by its path.

    A file needs no open_clip for it, so that a rerun, which only asks for fingerprints, is quick.
    """
    if Path(pretrained).is_file():
        return "{}"
    import open_clip

    return str(open_clip.get_pretrained_cfg(architecture, pretrained))


def _pretrained_file(scorer: str, architecture: str, pretrained: str) -> Path:
    """Return the weights of an architecture: the file that `pretrained` names, or its tag's."""
    if Path(pretrained).is_file():
        return Path(pretrained)
    import open_clip
    from open_clip.pretrained import download_pretrained

    check_architecture(architecture)
    tag = open_clip.get_pretrained_cfg(architecture, pretrained)
    if not tag:
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(architecture)) or "none"
        raise ConfigError(
            f"scorer {scorer}: pretrained={pretrained} is neither a file nor a tag of {architecture} "
            f"(its tags: {tags})"
        )
    try:
        file = Path(download_pretrained(tag))
    except (OSError, RuntimeError, ValueError) as error:
        page = f"https://huggingface.co/{tag['hf_hub'].strip('/')}" if tag.get("hf_hub") else tag.get("url")
        raise ConfigError(
            f"scorer {scorer}: cannot download the weights {pretrained} of {architecture}; get them from {page} and "
            "set pretrained to the file"
        ) from error
    if tag.get("hf_hub"):
        repository = str(Path(tag["hf_hub"]).parent if Path(tag["hf_hub"]).suffix else tag["hf_hub"]).strip("/")
        say(f"scorer {scorer}: the tag {pretrained} is not pinned; now {repository} at revision={revision_of(file)}")
    return file
