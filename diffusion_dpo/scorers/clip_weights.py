"""Where the files of a CLIP are: in the package, in a folder, on the hub, behind an open_clip tag; or who has them."""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusion_dpo.config import ConfigError
from diffusion_dpo.console import say, warn
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


@dataclass(frozen=True)
class Network:
    """What weights under the name of an architecture need to be computed as they were trained."""

    architecture: str
    """Of open_clip, with the activation that the weights were trained with."""
    preprocessing: Mapping[str, Any]
    """`mean`, `std`, `interpolation` and `resize_mode`; what is not there is as the architecture has it."""


_QUICK = "-quickgelu"
_PREPROCESSING = ("mean", "std", "interpolation", "resize_mode")


def find_network(scorer: str, architecture: str, pretrained: str, tag: str | None) -> Network:
    """Return the network that weights are of: those of an open_clip tag, or of a file, which does not say so itself.

    The same weights load under a name with and without -quickgelu, and compute something else. A file is therefore of
    the `tag` that is named for it, or of the only kind that the tags of its architecture have. Raises ConfigError,
    with the tags to choose from, where they differ.
    """
    import open_clip

    check_architecture(architecture)
    is_file = Path(pretrained).is_file()
    named = tag if is_file else pretrained
    if named is not None:
        found = open_clip.get_pretrained_cfg(architecture, named)
        if not found:
            raise ConfigError(
                f"scorer {scorer}: {named} is no tag of {architecture} (its tags: {_listed(architecture)})"
            )
        return _network(architecture, found)
    tags = {name: open_clip.get_pretrained_cfg(architecture, name) for name in _tags(architecture)}
    networks = {name: _network(architecture, found) for name, found in tags.items()}
    if len({(it.architecture, str(it.preprocessing)) for it in networks.values()}) > 1:
        raise ConfigError(
            f"scorer {scorer}: {pretrained} does not say how weights of {architecture} are computed: its tags differ "
            "in activation (QuickGELU: OpenAI's, MetaCLIP's and DFN's) or preprocessing. Set pretrained_tag to the "
            f"one that the file is of, or was fine-tuned from: {_listed(architecture)}"
        )
    if not tags and f"{architecture}{_QUICK}" in open_clip.list_models():
        warn(
            f"scorer {scorer}: {pretrained} is computed without QuickGELU, which a file does not say; for weights "
            f"that were trained with it, such as OpenAI's, set model={architecture}{_QUICK}"
        )
    return next(iter(networks.values()), Network(architecture, {}))


def _network(architecture: str, tag: Mapping[str, Any]) -> Network:
    """Return the network of a tag: its own activation, where open_clip has the architecture with both."""
    import open_clip

    plain = architecture.removesuffix(_QUICK)
    right = f"{plain}{_QUICK}" if tag.get("quick_gelu") else plain
    known = {key: tag[key] for key in _PREPROCESSING if tag.get(key) is not None}
    return Network(right if right in open_clip.list_models() else architecture, known)


def _tags(architecture: str) -> list[str]:
    import open_clip

    return list(open_clip.list_pretrained_tags_by_model(architecture))


def _listed(architecture: str) -> str:
    return ", ".join(_tags(architecture)) or "none"


def _pretrained_file(scorer: str, architecture: str, pretrained: str) -> Path:
    """Return the weights of an architecture: the file that `pretrained` names, or its tag's."""
    if Path(pretrained).is_file():
        return Path(pretrained)
    import open_clip
    from open_clip.pretrained import download_pretrained

    check_architecture(architecture)
    tag = open_clip.get_pretrained_cfg(architecture, pretrained)
    if not tag:
        raise ConfigError(
            f"scorer {scorer}: pretrained={pretrained} is neither a file nor a tag of {architecture} "
            f"(its tags: {_listed(architecture)})"
        )
    repository = "/".join(str(tag.get("hf_hub") or "").strip("/").split("/")[:2])
    try:
        file = Path(download_pretrained(tag))
    except (OSError, RuntimeError, ValueError) as error:
        page = f"https://huggingface.co/{repository}" if repository else tag.get("url")
        raise ConfigError(
            f"scorer {scorer}: cannot download the weights {pretrained} of {architecture}; get them from {page}, and "
            f"set pretrained to the file and pretrained_tag={pretrained}"
        ) from error
    if repository:
        say(f"scorer {scorer}: the tag {pretrained} is not pinned; now {repository} at revision={revision_of(file)}")
    return file
