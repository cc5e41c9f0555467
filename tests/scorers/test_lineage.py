"""Judges of one backbone or one data set are related; a formula is related to nobody."""

from pathlib import Path

import pytest

from diffusion_dpo.config import load
from diffusion_dpo.scorers import Scorer
from diffusion_dpo.scorers.lineage import CLIP_H, CLIP_L, clip_backbone, lineage_of_metrics
from diffusion_dpo.settings import CompareConfig

H14 = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"


def lineage(**settings: str) -> frozenset[str]:
    pairs = ", ".join(f"{key}: {value}" for key, value in settings.items())
    scorer: Scorer = load(CompareConfig, None, [f"scorers=[{{{pairs}}}]"]).scorers[0]
    return scorer.lineage


def test_judges_on_one_backbone_are_related() -> None:
    h14 = lineage(type="clip", model=f"'hf-hub:{H14}'")
    l14 = lineage(type="clip", model="'hf-hub:openai/clip-vit-large-patch14'")
    assert lineage(type="pickscore") & lineage(type="hps") & h14
    assert lineage(type="aesthetic") & l14 and not h14 & l14
    assert lineage(type="clip") == lineage(type="clip_image") and not lineage(type="clip") & h14
    assert lineage(type="lpips") == lineage(type="diversity")
    assert lineage(type="dino") == lineage(type="dino", pretrained="facebook/dinov2-small")
    assert not lineage(type="arcface") & lineage(type="arcface", model="antelopev2")
    assert lineage(type="arcface") == lineage(type="arcface", model="/models/buffalo_l")
    assert not lineage(type="brightness") and not lineage(type="pocket_scene")


def test_a_clip_is_the_same_by_whichever_name() -> None:
    import open_clip

    tags = open_clip.list_pretrained()
    for architecture, tag in [it for it in tags if it[1] in ("openai", "laion2b_s32b_b79k", "laion2b_s39b_b160k")]:
        known = open_clip.get_pretrained_cfg(architecture, tag)["hf_hub"].strip("/")
        assert clip_backbone(architecture, tag) == clip_backbone(f"hf-hub:{known}"), architecture
    assert clip_backbone("ViT-H-14", "laion2b_s32b_b79k") == clip_backbone(CLIP_H)
    for architecture in ("ViT-L-14", "ViT-L-14-quickgelu", "ViT-L-14-336"):
        assert clip_backbone(architecture, "openai") == clip_backbone(CLIP_L)
    assert clip_backbone("ViT-L-14", "laion2b_s32b_b82k") != clip_backbone(CLIP_L)


def test_weights_of_the_users_are_known_by_their_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.pt").touch()
    assert clip_backbone("local-dir:folder") == clip_backbone(f"local-dir:{tmp_path}/folder")
    assert clip_backbone("ViT-L-14", "own.pt") == clip_backbone("ViT-L-14", f"{tmp_path}/own.pt")
    assert len({clip_backbone("local-dir:a"), clip_backbone("local-dir:b"), clip_backbone("pocket")}) == 3


def test_a_vlm_is_the_same_whatever_it_is_asked() -> None:
    url = "'http://localhost:8000/v1'"
    one, two = (lineage(type="judge", url=url, model="m", question=it) for it in ("hands", "light"))
    assert one == two != lineage(type="judge", url=url, model="n")


def test_a_metric_of_the_past_is_its_judges_defaults() -> None:
    assert lineage_of_metrics(["pickscore"]) == lineage(type="pickscore")
    assert lineage_of_metrics(["clip_text", "lpips_alex"]) == lineage(type="clip") | lineage(type="lpips")
    assert lineage_of_metrics(["hps_v2"]) == lineage(type="hps")  # a choice away from the defaults
    assert lineage_of_metrics(["nearest_lpips_vgg"]) == lineage(type="lpips", net="vgg")
    assert not lineage_of_metrics(["clip_text_l14", "nobody"]) and not lineage_of_metrics([])
