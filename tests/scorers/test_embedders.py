"""PickScore, HPS, the aesthetic predictor and DINOv2 through the real libraries, with tiny models in folders."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from diffusion_dpo.config import ConfigError
from diffusion_dpo.scorers import Scorer, ScoreRequest
from diffusion_dpo.scorers.aesthetic import Aesthetic
from diffusion_dpo.scorers.dino import Dino
from diffusion_dpo.scorers.hps import Hps
from diffusion_dpo.scorers.judge import judge
from diffusion_dpo.scorers.pickscore import PickScore
from tests.photos import photo
from tests.scorers.tiny_models import HPS_ARCHITECTURE, make_dino, make_head, make_hps, make_transformers_clip

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_transformers_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def dino_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dino(tmp_path_factory.mktemp("dino"))


@pytest.fixture(scope="module")
def hps_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_hps(tmp_path_factory.mktemp("hps"))


@pytest.fixture(scope="module")
def photos() -> list[Image.Image]:
    return [photo(i, (80, 60)) for i in range(4)]


def _loaded(scorer: Scorer) -> Scorer:
    scorer.load(CPU)
    return scorer


def _pickscore(folder: Path) -> PickScore:
    return PickScore(type="pickscore", pretrained=str(folder), processor=None)


def _hps(folder: Path, **settings: object) -> Hps:
    return Hps(type="hps", pretrained=str(folder), architecture=HPS_ARCHITECTURE, **settings)


def test_pickscore_is_the_logit_of_the_whole_model(folder: Path, photos: list[Image.Image]) -> None:
    from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer

    prompts = ["red", "a cat", "blue", "dog"]
    model = CLIPModel.from_pretrained(folder).eval()
    pixels = CLIPImageProcessor.from_pretrained(folder)(photos, return_tensors="pt").pixel_values
    tokens = CLIPTokenizer.from_pretrained(folder)(prompts, padding=True, return_tensors="pt")
    with torch.no_grad():
        expected = model(pixel_values=pixels, **tokens).logits_per_image.diagonal()
    requests = [ScoreRequest(image, prompt) for image, prompt in zip(photos, prompts, strict=True)]
    values = judge(_loaded(_pickscore(folder)), requests, batch_size=4).values["pickscore"]
    np.testing.assert_allclose(values, expected, atol=1e-4)
    assert abs(values).max() > 1.001, "without the scale it would be a cosine"


def test_pickscore_cuts_long_prompts_and_keeps_their_end(
    folder: Path, photos: list[Image.Image], capsys: pytest.CaptureFixture[str]
) -> None:
    requests = [ScoreRequest(photos[0], prompt) for prompt in ("abc" * 10, "xyz" * 10, "short")]
    values = judge(_loaded(_pickscore(folder)), requests, batch_size=3).values["pickscore"]
    assert len(set(values.round(4))) == 3, "without its end token every long prompt is the same"
    assert "2 of 3 prompts are longer than the model's 12 tokens" in capsys.readouterr().out


def test_pickscore_takes_its_preprocessing_from_elsewhere(
    folder: Path, tmp_path: Path, photos: list[Image.Image]
) -> None:
    elsewhere = tmp_path / "processor"
    shutil.copytree(folder, elsewhere, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    scorer = PickScore(type="pickscore", pretrained=str(folder), processor=str(elsewhere))
    requests = [ScoreRequest(image, "red") for image in photos]
    same = judge(_loaded(_pickscore(folder)), requests, batch_size=4).values["pickscore"]
    np.testing.assert_array_equal(judge(_loaded(scorer), requests, batch_size=4).values["pickscore"], same)
    before = scorer.fingerprint()
    config = elsewhere / "preprocessor_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "image_mean": [0.1, 0.2, 0.3]}))
    assert scorer.fingerprint() != before
    assert np.abs(judge(_loaded(scorer), requests, batch_size=4).values["pickscore"] - same).max() > 1e-3
    config.unlink()
    with pytest.raises(ConfigError, match=r"lacks preprocessor_config\.json; download it from https"):
        scorer.load(CPU)


@pytest.mark.parametrize("version, metric", [("2.0", "hps_v2"), ("2.1", "hps_v21")])
def test_hps_is_the_cosine_of_a_whole_padded_image(
    version: str, metric: str, hps_folder: Path, tmp_path: Path, photos: list[Image.Image]
) -> None:
    """Square by hand: the longer side fits, black bars around; a centre crop would see other pixels."""
    import open_clip
    from torchvision.transforms import functional as F

    shutil.copy(hps_folder / "HPS_v2.1_compressed.pt", tmp_path / "HPS_v2_compressed.pt")
    found = tmp_path if version == "2.0" else hps_folder
    values = judge(_loaded(_hps(found, version=version)), [ScoreRequest(photos[0], "red")], batch_size=1).values
    file = str(hps_folder / "HPS_v2.1_compressed.pt")
    model, _ = open_clip.create_model_from_pretrained(HPS_ARCHITECTURE, file)
    small = photos[0].resize((32, 24), Image.Resampling.BICUBIC)
    square = Image.new("RGB", (32, 32))
    square.paste(small, (0, 4))
    pixels = F.normalize(F.to_tensor(square), open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD)
    tokens = open_clip.get_tokenizer(HPS_ARCHITECTURE)(["red"])
    with torch.no_grad():
        expected = torch.cosine_similarity(model.eval().encode_image(pixels[None]), model.encode_text(tokens))
    assert values[metric] == pytest.approx(expected.numpy(), abs=1e-5)


def test_hps_takes_its_version_as_people_write_it() -> None:
    assert [_hps(Path("x"), version=v).metrics[0].name for v in (2.0, 2.1, "2.0")] == ["hps_v2", "hps_v21", "hps_v2"]
    with pytest.raises(ValueError, match=r"2\.0"):
        _hps(Path("x"), version="3")


def test_hps_says_what_is_missing_or_wrong(hps_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"lacks HPS_v2_compressed\.pt; download it from https.*xswu.*Apache"):
        _hps(hps_folder, version="2.0").fingerprint()
    with pytest.raises(ConfigError, match="Did you mean 'ViT-H-14'"):
        Hps(type="hps", pretrained=str(hps_folder), architecture="ViT-H14").load(CPU)
    with pytest.raises(ConfigError, match="hps cannot load"):
        Hps(type="hps", pretrained=str(hps_folder), architecture="ViT-S-32").load(CPU)
    assert _hps(hps_folder).fingerprint() != Hps(type="hps", pretrained=str(hps_folder)).fingerprint(), "architecture"
    other = tmp_path / "HPS_v2.1_compressed.pt"
    other.write_bytes((hps_folder / other.name).read_bytes() + b" ")
    assert _hps(tmp_path).fingerprint() != _hps(hps_folder).fingerprint()


def test_aesthetic_is_the_head_on_the_unit_embedding(folder: Path, tmp_path: Path, photos: list[Image.Image]) -> None:
    from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer

    head = make_head(tmp_path / "head.pth")
    model = CLIPModel.from_pretrained(folder).eval()
    pixels = CLIPImageProcessor.from_pretrained(folder)(photos, return_tensors="pt").pixel_values
    tokens = CLIPTokenizer.from_pretrained(folder)(["red"], return_tensors="pt")
    state = torch.load(head, weights_only=True)
    with torch.no_grad():
        hidden = model(pixel_values=pixels, **tokens).image_embeds
    assert hidden.norm(dim=1) == pytest.approx(np.ones(4), abs=1e-5)
    for i in (0, 2, 4, 6, 7):
        hidden = hidden @ state[f"layers.{i}.weight"].T + state[f"layers.{i}.bias"]
    scorer = Aesthetic(type="aesthetic", encoder=str(folder), head=head)
    values = judge(_loaded(scorer), [ScoreRequest(image) for image in photos], batch_size=4).values["aesthetic"]
    np.testing.assert_allclose(values, hidden[:, 0], atol=1e-5)
    before = scorer.fingerprint()
    make_head(head, width=8)
    assert scorer.fingerprint() != before


def test_a_head_for_another_encoder_is_refused(folder: Path, tmp_path: Path) -> None:
    make_head(tmp_path / "sac+logos+ava1-l14-linearMSE.pth", width=24)
    with pytest.raises(ConfigError, match=r"takes embeddings of 24 numbers, and .* gives 16"):
        Aesthetic(type="aesthetic", encoder=str(folder), head=tmp_path).load(CPU)


@pytest.mark.parametrize("name", ["layers.7.bias", "layers.4.weight"])
def test_what_is_no_head_is_refused(name: str, folder: Path, tmp_path: Path) -> None:
    head = make_head(tmp_path / "head.pth")
    state = torch.load(head, weights_only=True)
    del state[name]
    torch.save(state, head)
    with pytest.raises(ConfigError, match=r"head\.pth is not a head of linear layers"):
        Aesthetic(type="aesthetic", encoder=str(folder), head=head).load(CPU)


def test_a_missing_head_is_one_sentence(folder: Path, tmp_path: Path) -> None:
    scorer = Aesthetic(type="aesthetic", encoder=str(folder), head=tmp_path / "none.pth")
    with pytest.raises(ConfigError, match=r"no file .*none\.pth; download it from https://github.*Apache-2\.0"):
        scorer.fingerprint()


def test_dino_is_the_cosine_of_the_class_token(dino_folder: Path, photos: list[Image.Image]) -> None:
    from transformers import AutoImageProcessor, Dinov2Model

    pixels = AutoImageProcessor.from_pretrained(dino_folder)(photos, return_tensors="pt").pixel_values
    with torch.no_grad():
        tokens = Dinov2Model.from_pretrained(dino_folder).eval()(pixel_values=pixels).pooler_output
    cosines = torch.cosine_similarity(tokens[:1], tokens).numpy()
    scorer = _loaded(Dino(type="dino", pretrained=str(dino_folder)))
    requests = [ScoreRequest(photos[0], references=(image,)) for image in photos]
    requests.append(ScoreRequest(photos[0], references=(photos[1], photos[2])))
    values = judge(scorer, requests, batch_size=8).values["dino"]
    np.testing.assert_allclose(values[:4], cosines, atol=1e-5)
    assert values[4] == pytest.approx(cosines[1:3].mean(), abs=1e-5)


def test_random_weights_never_judge(dino_folder: Path, folder: Path, tmp_path: Path) -> None:
    """Weights that a file lacks are made up by transformers, which says so in its log alone."""
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    state = load_file(tmp_path / "model.safetensors")
    del state["text_projection.weight"]
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ConfigError, match=r"lacks 1 of the weights of a CLIPModel, such as text_projection\.weight"):
        _pickscore(tmp_path).load(CPU)
    with pytest.raises(ConfigError, match=r"pickscore.*right model"):
        PickScore(type="pickscore", pretrained=str(dino_folder), processor=str(folder)).load(CPU)


def test_half_precision_files_are_computed_in_float32(folder: Path, tmp_path: Path) -> None:
    from transformers import CLIPModel

    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    CLIPModel.from_pretrained(folder).half().save_pretrained(tmp_path)
    scorer = _pickscore(tmp_path)
    scorer.load(CPU)
    assert scorer._vision is not None
    assert {p.dtype for p in scorer._vision.model.parameters()} == {torch.float32}
    assert not any(p.requires_grad for p in scorer._vision.model.parameters())
    assert not scorer._vision.model.training
