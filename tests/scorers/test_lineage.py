"""Judges of one backbone or one data set are related; a formula is related to nobody."""

from diffusion_dpo.config import load
from diffusion_dpo.scorers import Scorer
from diffusion_dpo.scorers.lineage import lineage_of_metrics
from diffusion_dpo.settings import CompareConfig


def lineage(**settings: str) -> frozenset[str]:
    pairs = ", ".join(f"{key}: {value}" for key, value in settings.items())
    scorer: Scorer = load(CompareConfig, None, [f"scorers=[{{{pairs}}}]"]).scorers[0]
    return scorer.lineage


def test_judges_on_one_backbone_are_related() -> None:
    h14 = lineage(type="clip", model="ViT-H-14", pretrained="laion2b_s32b_b79k")
    l14 = lineage(type="clip", model="ViT-L-14-quickgelu", pretrained="openai")
    assert lineage(type="pickscore") & lineage(type="hps") & h14
    assert lineage(type="aesthetic") & l14 and not h14 & l14
    assert lineage(type="clip") == lineage(type="clip_image") and not lineage(type="clip") & h14
    assert lineage(type="lpips") == lineage(type="diversity")
    assert not lineage(type="brightness") and not lineage(type="pocket_scene")


def test_a_metric_of_the_past_is_its_judges_defaults() -> None:
    assert lineage_of_metrics(["pickscore"]) == lineage(type="pickscore")
    assert lineage_of_metrics(["clip_text", "lpips_alex"]) == lineage(type="clip") | lineage(type="lpips")
    assert not lineage_of_metrics(["clip_text_l14", "nobody"]) and not lineage_of_metrics([])
