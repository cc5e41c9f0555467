"""CLIP through the real open_clip, with a tiny model in a folder."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diffusion_dpo.config import ConfigError
from diffusion_dpo.scorers import ScoreRequest
from diffusion_dpo.scorers.clip import Clip, ClipScorer
from diffusion_dpo.scorers.clip_diversity import ClipDiversity
from diffusion_dpo.scorers.clip_image import ClipImage
from diffusion_dpo.scorers.clip_weights import find_network, locate
from diffusion_dpo.scorers.judge import judge
from diffusion_dpo.scorers.weights import files_of
from tests.scorers.tiny_hub import COMMIT, put_on_hub

CPU = torch.device("cpu")


def _clip(folder: Path, **settings: str) -> Clip:
    return Clip(type="clip", model=f"local-dir:{folder}", **settings)


def _loaded(folder: Path) -> Clip:
    scorer = _clip(folder)
    scorer.load(CPU)
    return scorer


def _loaded_for_images(folder: Path) -> ClipImage:
    scorer = ClipImage(type="clip_image", model=f"local-dir:{folder}")
    scorer.load(CPU)
    return scorer


@pytest.fixture(scope="module")
def images() -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (40, 56, 3), dtype=np.uint8)) for _ in range(4)]


def test_equals_open_clip_by_hand(clip_dir: Path, images: list[Image.Image]) -> None:
    import open_clip

    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{clip_dir}")
    tokens = open_clip.get_tokenizer(f"local-dir:{clip_dir}")(["red", "blue"])
    with torch.no_grad():
        pixels = model.eval().encode_image(torch.stack([preprocess(image) for image in images[:2]])).double()
        words = model.encode_text(tokens).double()
    expected = torch.cosine_similarity(pixels, words, dim=1).numpy()
    requests = [ScoreRequest(images[0], "red"), ScoreRequest(images[1], "blue")]
    values = judge(_loaded(clip_dir), requests, batch_size=2).values["clip_text"]
    np.testing.assert_allclose(values, expected, atol=1e-6)


def test_an_image_is_most_like_itself(clip_dir: Path, images: list[Image.Image]) -> None:
    scorer = _loaded_for_images(clip_dir)
    values = judge(scorer, [ScoreRequest(image, references=(images[0],)) for image in images], batch_size=4).values
    assert values["clip_image"].argmax() == 0
    assert values["clip_image"][0] == pytest.approx(1, abs=1e-5)


def test_several_references_are_averaged(clip_dir: Path, images: list[Image.Image]) -> None:
    scorer = _loaded_for_images(clip_dir)
    references = [(images[1],), (images[2],), (images[1], images[2])]
    values = judge(scorer, [ScoreRequest(images[0], references=r) for r in references], batch_size=4).values
    first, second, both = values["clip_image"]
    assert both == pytest.approx((first + second) / 2, abs=1e-6)


def test_diversity_is_the_distance_to_the_others_and_a_copy_is_at_none(
    clip_dir: Path, images: list[Image.Image]
) -> None:
    alike = _loaded_for_images(clip_dir)
    likeness = judge(alike, [ScoreRequest(images[0], references=(image,)) for image in images[1:]], batch_size=4)
    apart = 1 - likeness.values["clip_image"]
    scorer = ClipDiversity(type="clip_diversity", model=f"local-dir:{clip_dir}")
    scorer.load(CPU)
    others = tuple(images[1:])
    requests = [ScoreRequest(images[0], rivals=others), ScoreRequest(images[0], rivals=others, copies=2)]
    values = judge(scorer, [*requests, ScoreRequest(images[0])], batch_size=3).values
    np.testing.assert_allclose(values["nearest_clip"], [apart.min(), 0, np.nan], atol=1e-5)
    np.testing.assert_allclose(values["mean_clip"], [apart.mean(), apart.sum() / 4, np.nan], atol=1e-5)


def test_a_long_prompt_keeps_its_end_token(
    clip_dir: Path, images: list[Image.Image], capsys: pytest.CaptureFixture[str]
) -> None:
    scorer = _loaded(clip_dir)
    prompts = ["abc" * 10, "xyz" * 10]
    values = judge(scorer, [ScoreRequest(images[0], prompt) for prompt in prompts], batch_size=2).values["clip_text"]
    assert values[0] != pytest.approx(values[1], abs=1e-4), "without its end token every prompt is the same"
    assert "2 of 2 prompts are longer than the model's 12 tokens" in capsys.readouterr().out
    judge(scorer, [ScoreRequest(images[0], "pqr" * 10)], batch_size=1)
    assert "longer" not in capsys.readouterr().out, "once is enough"


def test_a_short_prompt_is_not_called_long(
    clip_dir: Path, images: list[Image.Image], capsys: pytest.CaptureFixture[str]
) -> None:
    judge(_loaded(clip_dir), [ScoreRequest(images[0], "short")], batch_size=1)
    assert "longer" not in capsys.readouterr().out


def test_a_prompt_is_encoded_once(clip_dir: Path, images: list[Image.Image], monkeypatch: pytest.MonkeyPatch) -> None:
    scorer = _loaded(clip_dir)
    assert scorer._clip is not None
    encoded: list[int] = []
    encode_text = scorer._clip.model.encode_text

    def counted(tokens: torch.Tensor, normalize: bool) -> torch.Tensor:
        encoded.append(len(tokens))
        return encode_text(tokens, normalize=normalize)

    monkeypatch.setattr(scorer._clip.model, "encode_text", counted)
    judge(scorer, [ScoreRequest(image, "red") for image in images], batch_size=2)
    assert encoded == [1]


def test_the_model_is_frozen_and_in_eval_mode(clip_dir: Path) -> None:
    live = _loaded(clip_dir)._clip
    assert live is not None
    assert not any(module.training for module in live.model.modules())
    assert not any(parameter.requires_grad for parameter in live.model.parameters())


def test_the_pocket_clip_judges_captions_of_its_world_alone(images: list[Image.Image]) -> None:
    scorer = Clip(type="clip")
    scorer.load(CPU)
    requests = [ScoreRequest(images[0], text) for text in ("a red circle on a blue background", "a castle at dusk")]
    scores = judge(scorer, requests, batch_size=2)
    assert np.isfinite(scores.values["clip_text"]).tolist() == [True, False]
    assert list(scores.reasons) == ["", "the prompt is not a caption of the pocket world"]


def test_two_clips_side_by_side(clip_dir: Path) -> None:
    assert _clip(clip_dir, name="l14").metrics[0].name == "clip_text_l14"
    assert ClipImage(type="clip_image", name="l14").metrics[0].name == "clip_image_l14"


def test_the_fingerprint_is_that_of_the_content(clip_dir: Path, tmp_path: Path) -> None:
    copy = tmp_path / "elsewhere"
    shutil.copytree(clip_dir, copy)
    before = _clip(clip_dir).fingerprint()
    assert _clip(copy).fingerprint() == before
    assert ClipImage(type="clip_image", model=f"local-dir:{copy}").fingerprint() != before
    config = copy / "open_clip_config.json"
    config.write_text(config.read_text().replace("bicubic", "bilinear"))
    assert _clip(copy).fingerprint() != before
    shutil.copy(clip_dir / config.name, config)
    weights = copy / "open_clip_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert _clip(copy).fingerprint() != before


def test_the_fingerprint_of_weights_by_their_path_has_the_architecture(clip_dir: Path) -> None:
    file = str(clip_dir / "open_clip_model.safetensors")
    names = ("ViT-B-32", "ViT-B-32-quickgelu")
    assert len({Clip(type="clip", model=name, pretrained=file).fingerprint() for name in names}) == 2


def _on_hub(clip_dir: Path, cache: Path) -> Path:
    return put_on_hub(cache, {file.name: file.read_bytes() for file in files_of(clip_dir)})


@pytest.mark.parametrize("kind", [Clip, ClipImage])
def test_a_model_of_the_hub_judges_as_its_folder_does(
    kind: type[ClipScorer], clip_dir: Path, cache: Path, images: list[Image.Image], capsys: pytest.CaptureFixture[str]
) -> None:
    _on_hub(clip_dir, cache)
    local = kind(type="clip", model=f"local-dir:{clip_dir}")
    hub = kind(type="clip", model="hf-hub:org/name", revision=COMMIT)
    assert hub.fingerprint() == local.fingerprint()
    requests = [ScoreRequest(image, "red", (images[0],)) for image in images]
    for scorer in (hub, local):
        scorer.load(CPU)
    ours, theirs = (judge(scorer, requests, batch_size=4).values for scorer in (hub, local))
    np.testing.assert_array_equal(ours[hub.metrics[0].name], theirs[local.metrics[0].name])
    assert "pinned" not in capsys.readouterr().out
    kind(type="clip", model="hf-hub:org/name").load(CPU)
    assert f"org/name is not pinned; now at revision={COMMIT}" in capsys.readouterr().out


def test_another_revision_or_tokenizer_is_another_model(clip_dir: Path, cache: Path) -> None:
    snapshot = _on_hub(clip_dir, cache)
    hub = Clip(type="clip", model="hf-hub:org/name", revision=COMMIT)
    before = hub.fingerprint()
    (snapshot / "model.safetensors").write_bytes(b"of transformers, brought by somebody else")
    assert hub.fingerprint() == before, "open_clip does not read it"
    with pytest.raises(ConfigError, match=r"cannot be had from the hub.*https://huggingface\.co/org/name"):
        Clip(type="clip", model="hf-hub:org/name", revision="v2").fingerprint()
    tokenizer = snapshot / "tokenizer.json"
    content = tokenizer.read_bytes()
    tokenizer.unlink()
    tokenizer.write_bytes(content + b" ")
    assert hub.fingerprint() != before
    (snapshot / "open_clip_model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"org/name has no open_clip_model\.safetensors; download it from"):
        hub.load(CPU)


@pytest.mark.parametrize(
    "settings, complaint",
    [
        ({"model": "ViT-B-32"}, "architecture without weights"),
        ({"model": "pocket", "pretrained": "openai"}, "brings its own weights"),
        ({"model": "hf-hub:org/name", "pretrained": "openai"}, "brings its own weights"),
        ({"name": "L/14"}, "name"),
        ({"revision": "main"}, "revision pins what is on the hub, and model=pocket"),
        ({"model": "ViT-B-32", "pretrained": "openai", "revision": "main"}, "revision pins"),
    ],
)
def test_settings_that_contradict_each_other(settings: dict[str, str], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        Clip(type="clip", **settings)


def test_missing_files_are_named(clip_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no folder .*nowhere"):
        _clip(tmp_path / "nowhere").load(CPU)
    with pytest.raises(ConfigError, match=r"lacks open_clip_config\.json"):
        _clip(tmp_path).load(CPU)
    shutil.copy(clip_dir / "open_clip_config.json", tmp_path)
    for act in (lambda: _clip(tmp_path).load(CPU), _clip(tmp_path).fingerprint):
        with pytest.raises(ConfigError, match=r"no weights; download open_clip_model\.safetensors"):
            act()


def test_damaged_weights_are_refused(clip_dir: Path, tmp_path: Path) -> None:
    folder = tmp_path / "clip"
    shutil.copytree(clip_dir, folder)
    weights = folder / "open_clip_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(ConfigError, match="cannot load"):
        _clip(folder).load(CPU)


def test_unknown_architecture_tag_or_file() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'ViT-B-32'"):
        Clip(type="clip", model="ViT-B32", pretrained="openai").fingerprint()
    with pytest.raises(ConfigError, match=r"neither a file nor a tag of ViT-B-32 .*openai"):
        Clip(type="clip", model="ViT-B-32", pretrained="nonsense").fingerprint()


def test_an_unknown_architecture_beside_a_file(clip_dir: Path) -> None:
    file = clip_dir / "open_clip_model.safetensors"
    with pytest.raises(ConfigError, match="Did you mean 'ViT-B-32'"):
        Clip(type="clip", model="ViT-B32", pretrained=str(file)).load(CPU)


def test_the_fingerprint_of_files_needs_no_heavy_library(clip_dir: Path) -> None:
    """A rerun asks for fingerprints alone."""
    code = (
        "import sys; from diffusion_dpo.scorers.clip import Clip; "
        f"Clip(type='clip').fingerprint(); Clip(type='clip', model='local-dir:{clip_dir}').fingerprint(); "
        f"Clip(type='clip', model='ViT-B-32', pretrained='{clip_dir}/open_clip_model.safetensors').fingerprint(); "
        "print({'open_clip', 'torch', 'transformers'} & sys.modules.keys())"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"


OPENAI, HALF = [0.48145466, 0.4578275, 0.40821073], [0.5] * 3


@pytest.mark.parametrize(
    ("architecture", "tag", "expected", "mean", "resize"),
    [
        ("ViT-B-32", "openai", "ViT-B-32-quickgelu", OPENAI, "shortest"),
        ("ViT-B-32", "laion2b_s34b_b79k", "ViT-B-32", OPENAI, "shortest"),
        ("ViT-B-32-quickgelu", None, "ViT-B-32-quickgelu", OPENAI, "shortest"),
        ("ViT-L-14", "laion2b_s32b_b82k", "ViT-L-14", HALF, "shortest"),
        ("ViT-H-14", "dfn5b", "ViT-H-14-quickgelu", OPENAI, "squash"),
        ("ViT-B-16-SigLIP", None, "ViT-B-16-SigLIP", HALF, "squash"),
    ],
)
def test_weights_from_a_file_are_computed_as_those_of_their_tag(
    architecture: str, tag: str | None, expected: str, mean: list[float], resize: str, clip_dir: Path
) -> None:
    file = str(clip_dir / "open_clip_model.safetensors")
    found = [find_network("clip", architecture, file, tag)]
    if tag is not None:
        found.append(find_network("clip", architecture, tag, None))
    for network in found:
        assert network.architecture == expected
        assert list(network.preprocessing["mean"]) == mean and network.preprocessing["resize_mode"] == resize


@pytest.mark.parametrize("architecture", ["ViT-B-32", "ViT-L-14", "ViT-H-14-quickgelu"])
def test_a_file_that_may_be_of_several_networks_needs_its_tag(architecture: str, clip_dir: Path) -> None:
    scorer = Clip(type="clip", model=architecture, pretrained=str(clip_dir / "open_clip_model.safetensors"))
    with pytest.raises(ConfigError, match=r"Set pretrained_tag to the one that the file is of.*dfn|openai") as caught:
        scorer.load(CPU)
    assert "\n" not in str(caught.value)
    wrong = scorer.model_copy(update={"pretrained_tag": "nonsense"})
    with pytest.raises(ConfigError, match="nonsense is no tag of"):
        wrong.load(CPU)


@pytest.fixture
def tiny_architectures(clip_dir: Path, tmp_path: Path) -> None:
    """The tiny CLIP as two architectures of open_clip, of which the second has QuickGELU."""
    import open_clip

    config = json.loads((clip_dir / "open_clip_config.json").read_text())["model_cfg"]
    config["text_cfg"]["hf_tokenizer_name"] = str(clip_dir)
    for name, extra in (("tiny-test", {}), ("tiny-test-quickgelu", {"quick_gelu": True})):
        (tmp_path / f"{name}.json").write_text(json.dumps(config | extra))
    open_clip.add_model_config(tmp_path)


@pytest.mark.usefixtures("tiny_architectures")
def test_the_tag_of_a_file_decides_activation_and_preprocessing(
    clip_dir: Path,
    images: list[Image.Image],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import open_clip

    file = str(clip_dir / "open_clip_model.safetensors")

    def score(model: str, **settings: str) -> float:
        scorer = Clip(type="clip", model=model, pretrained=file, **settings)
        scorer.load(CPU)
        return float(judge(scorer, [ScoreRequest(images[0], "red")], batch_size=1).values["clip_text"][0])

    plain, quick = score("tiny-test"), score("tiny-test-quickgelu")
    assert plain != pytest.approx(quick, abs=1e-5)
    assert "without QuickGELU, which a file does not say" in " ".join(capsys.readouterr().out.split())
    kinds = {"fast": {"quick_gelu": True, "mean": (0.1,) * 3, "std": (0.5,) * 3, "resize_mode": "squash"}, "plain": {}}
    monkeypatch.setattr(open_clip, "list_pretrained_tags_by_model", lambda _: list(kinds))
    monkeypatch.setattr(open_clip, "get_pretrained_cfg", lambda _, tag: kinds.get(tag, {}) | {"url": tag})
    model, preprocess = open_clip.create_model_from_pretrained(
        "tiny-test",
        file,
        force_quick_gelu=True,
        image_mean=(0.1,) * 3,
        image_std=(0.5,) * 3,
        image_resize_mode="squash",
    )
    with torch.no_grad():
        pixels = model.eval().encode_image(preprocess(images[0])[None], normalize=True)
        words = model.encode_text(open_clip.get_tokenizer("tiny-test")(["red"]), normalize=True)
    assert score("tiny-test", pretrained_tag="fast") == pytest.approx(float((pixels * words).sum()), abs=1e-6)
    with pytest.raises(ConfigError, match=r"set pretrained_tag|Set pretrained_tag to the one.*fast, plain"):
        score("tiny-test")


def test_what_is_pinned_is_named_by_its_repository(
    clip_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A repository's name may have a dot, as those of timm have; a file may be named behind it."""
    import open_clip.pretrained

    file = clip_dir / "open_clip_model.safetensors"
    monkeypatch.setattr(open_clip.pretrained, "download_pretrained", lambda _: str(file))
    locate("clip", "ViT-B-32-quickgelu", "openai", None)
    assert "now timm/vit_base_patch32_clip_224.openai at revision" in capsys.readouterr().out
