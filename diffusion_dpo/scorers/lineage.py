"""Which judges are related: a backbone or training data in common makes them err together."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal, cast, get_args, get_origin

from diffusion_dpo import registry
from diffusion_dpo.scorers import Scorer
from diffusion_dpo.scorers.clip_weights import HUB, LOCAL

CLIP_H = f"{HUB}laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
CLIP_L = f"{HUB}openai/clip-vit-large-patch14"
_SAME_WEIGHTS = {
    "timm/vit_base_patch16_clip_224.openai": "openai/clip-vit-base-patch16",
    "timm/vit_base_patch32_clip_224.openai": "openai/clip-vit-base-patch32",
    "timm/vit_large_patch14_clip_224.openai": "openai/clip-vit-large-patch14",
    "timm/vit_large_patch14_clip_336.openai": "openai/clip-vit-large-patch14",  # one epoch more, of more pixels
    "openai/clip-vit-large-patch14-336": "openai/clip-vit-large-patch14",
}


def clip_backbone(model: str, pretrained: str | None = None) -> str:
    """Return the tag of a CLIP that is named as in ClipScorer: its id on the hub, whichever way it is named."""
    if model.startswith(LOCAL):
        name = _place(model.removeprefix(LOCAL))
    elif pretrained is None:
        name = model.removeprefix(HUB)
    elif Path(pretrained).expanduser().is_file():
        name = _place(pretrained)
    else:
        import open_clip

        known = open_clip.get_pretrained_cfg(model, pretrained).get("hf_hub")
        name = known.strip("/") if known else f"{model} {pretrained}"
    return f"backbone: CLIP {_SAME_WEIGHTS.get(name, name)}"


def _place(path: str) -> str:
    return str(Path(path).expanduser().resolve())


def lineage_of_metrics(names: Iterable[str]) -> frozenset[str]:
    """Return the lineage of the registered judges that give these metrics with their defaults, or all but one of them.

    A training run remembers names of metrics only, and `hps_v2` and `lpips_vgg` are a choice away from the defaults. A
    name that none of them gives says nothing.
    """
    wanted = set(names)
    found: set[str] = set()
    for name in registry.TABLES["scorers"] if wanted else ():
        cls = cast(type[Scorer], registry.resolve("scorers", name))
        if any(field.is_required() for field in cls.model_fields.values()):  # a judge behind an address, say
            continue
        for settings in _near_defaults(cls):
            scorer = cls.model_validate({"type": name, **settings})
            if wanted & {metric.name for metric in scorer.metrics}:
                found |= scorer.lineage
    return frozenset(found)


def _near_defaults(cls: type[Scorer]) -> Iterator[dict[str, object]]:
    """Yield no settings, and then every choice of every setting that is one of a few."""
    yield {}
    for setting, field in cls.model_fields.items():
        if get_origin(field.annotation) is Literal:
            yield from ({setting: choice} for choice in get_args(field.annotation))
