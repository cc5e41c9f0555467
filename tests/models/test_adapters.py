"""Training that starts from an adapter: what the reference is, what is trained, what is saved, what is refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from diffusion_dpo.config import ConfigError
from diffusion_dpo.models.lora_file import LoraLayer
from diffusion_dpo.models.lora_layers import peft_layers
from diffusion_dpo.models.lora_write import LORA_FILE
from diffusion_dpo.models.stable_diffusion import LoadedStableDiffusion, StableDiffusion
from diffusion_dpo.models.start import Start
from diffusion_dpo.models.unet_diffusion import Lora
from diffusion_dpo.sampling import DrawRequest, draw, load_pipeline
from diffusion_dpo.settings import ImageModel, Sampling
from tests.fakes import make_stable_diffusion

CPU = torch.device("cpu")
OLD = Lora(rank=3, alpha=5, targets=("to_q", "ff.net.0.proj", "conv1"))
NEW = Lora(rank=2, alpha=7, targets=("to_q", "to_k", "conv2"))


def load(
    start: Path | None = None,
    lora: Lora | None = NEW,
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    base: str = "pocket",
) -> LoadedStableDiffusion:
    model = StableDiffusion(pretrained=base, adapter_path=start, lora=lora).load(device=CPU, dtype=dtype, seed=seed)
    if lora is None:
        model.freeze_copy()
    return model


def train(model: LoadedStableDiffusion, seed: int) -> LoadedStableDiffusion:
    """Move what is trained, as many steps would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.trainable().values():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return model


def predict(model: LoadedStableDiffusion) -> torch.Tensor:
    noisy, timesteps = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([10, 900])
    return model.predict(noisy, timesteps, model.encode_prompts(["a red circle", "a blue square"])).detach()


def reference(model: LoadedStableDiffusion) -> torch.Tensor:
    with model.reference():
        return predict(model)


def by_diffusers(saved: Path) -> torch.Tensor:
    """What plain diffusers predicts with a saved folder, read without a line of ours."""
    from diffusers import StableDiffusionPipeline, UNet2DConditionModel

    from diffusion_dpo.models.pipeline import POCKET_DIR

    pipeline = StableDiffusionPipeline.from_pretrained(POCKET_DIR, safety_checker=None)
    if saved.name == "unet":
        pipeline.unet = UNet2DConditionModel.from_pretrained(saved)
    else:
        pipeline.load_lora_weights(saved)
    plain = load(lora=None)
    plain.unet = pipeline.unet.eval()
    return predict(plain)


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with a LoRA: its alpha is not its rank, and not all of its layers are attention."""
    run = tmp_path_factory.mktemp("old")
    train(load(lora=OLD), 1).save(run)
    return run


@pytest.fixture(scope="module")
def old_unet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with a whole UNet."""
    run = tmp_path_factory.mktemp("old")
    train(load(lora=None), 1).save(run)
    return run


@pytest.fixture(params=["old", "old_unet"])
def any_old(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


def test_a_lora_on_any_layers_is_saved_as_plain_diffusers_reads_it(tmp_path: Path) -> None:
    model = train(load(lora=OLD), 1)
    saved = model.save(tmp_path)
    assert saved == tmp_path / "adapter"
    torch.testing.assert_close(by_diffusers(saved), predict(model), rtol=0, atol=1e-5)
    assert (predict(model) - reference(model)).abs().max() > 0.02


@pytest.mark.parametrize(("alpha", "factor"), [(7, 3.5), (1, 0.5), (None, 1.0)])
def test_what_is_trained_adds_alpha_over_rank_times_b_a(alpha: float | None, factor: float) -> None:
    """Written out on the weights of a plain UNet; of a convolution, B is (out, r, 1, 1) and A is (r, in, k, k)."""
    model = train(load(lora=Lora(rank=2, alpha=alpha, targets=("to_q", "conv2"))), 1)
    plain = load(lora=None)
    layers = {name: module for name, module in model.unet.named_modules() if hasattr(module, "lora_A")}
    assert {plain.unet.get_submodule(name).weight.ndim for name in layers} == {2, 4}
    with torch.no_grad():
        for name, layer in layers.items():
            (up,), (down,) = layer.lora_B.values(), layer.lora_A.values()
            product = torch.einsum("or,r...->o...", up.weight.flatten(1), down.weight)
            plain.unet.get_submodule(name).weight += factor * product
    torch.testing.assert_close(predict(plain), predict(model), rtol=0, atol=1e-5)
    assert (predict(model) - reference(model)).abs().max() > 0.005


@pytest.mark.parametrize("lora", [NEW, None], ids=["lora", "full"])
def test_training_starts_exactly_where_the_reference_is(any_old: Path, lora: Lora | None) -> None:
    """Which is what the old adapter made of the base."""
    model = load(any_old, lora)
    assert torch.equal(predict(model), reference(model))
    saved = next(path for path in (any_old / "adapter", any_old / "unet") if path.exists())
    torch.testing.assert_close(reference(model), by_diffusers(saved), rtol=0, atol=1e-5)
    assert (reference(model) - reference(load())).abs().max() > 0.02


@pytest.mark.parametrize("lora", [NEW, None], ids=["lora", "full"])
def test_the_reference_does_not_move_and_leaves_no_trace(any_old: Path, lora: Lora | None) -> None:
    model = load(any_old, lora)
    start, names = reference(model), list(model.trainable())
    parameters = dict(model.unet.named_parameters())
    before = {name: parameter.requires_grad for name, parameter in parameters.items()}
    policy = predict(train(model, 2))
    assert (policy - start).abs().max() > 0.02
    with pytest.raises(KeyError), model.reference():
        assert torch.equal(predict(model), start)
        assert {name: parameter.requires_grad for name, parameter in parameters.items()} == before
        raise KeyError
    assert torch.equal(predict(model), policy)
    assert list(model.trainable()) == names
    assert all(parameter is parameters[name] for name, parameter in model.trainable().items())


def test_the_start_itself_is_trained_with_the_targets_and_nothing_else(old: Path) -> None:
    model = load(old)
    layers = {name.split(".lora_")[0] for name in model.trainable()}
    assert layers == {name.split(".lora_")[0] for lora in (OLD, NEW) for name in load(lora=lora).trainable()}, (
        "those of the start, and those that were asked for"
    )
    noisy, timesteps = torch.randn(2, 4, 8, 8), torch.tensor([10, 900])
    model.predict(noisy, timesteps, model.encode_prompts(["a", "b"])).pow(2).mean().backward()
    graded = {name for name, parameter in model.unet.named_parameters() if parameter.grad is not None}
    assert graded == set(model.trainable())
    assert {parameter.dtype for parameter in model.trainable().values()} == {torch.float32}


def test_the_seed_alone_decides_how_what_is_new_begins(old: Path) -> None:
    first, again, other = load(old), load(old), load(old, seed=1)
    for name, parameter in first.trainable().items():
        assert torch.equal(parameter, again.trainable()[name])
        is_new = ".lora_A." in name and any(layer in name for layer in ("to_k", "conv2"))
        assert torch.equal(parameter, other.trainable()[name]) != is_new


@pytest.mark.parametrize("lora", [NEW, Lora(rank=3), None], ids=["other", "default", "full"])
def test_what_is_saved_needs_nothing_but_the_base(any_old: Path, tmp_path: Path, lora: Lora | None) -> None:
    model = train(load(any_old, lora), 2)
    policy, start, names = predict(model), reference(model), list(model.trainable())
    saved = model.save(tmp_path)
    torch.testing.assert_close(by_diffusers(saved), policy, rtol=0, atol=1e-5)
    assert (policy - start).abs().max() > 0.02
    # and training could go on
    assert torch.equal(predict(model), policy)
    assert torch.equal(reference(model), start)
    assert list(model.trainable()) == names


def test_the_model_card_loads_what_is_saved(any_old: Path, tmp_path: Path) -> None:
    settings = StableDiffusion(adapter_path=any_old, lora=NEW)
    model = train(settings.load(device=CPU, dtype=torch.float32, seed=0), 2)
    loaded: dict[str, Any] = {}
    adapter = str(model.save(tmp_path))
    exec(settings.usage(adapter), loaded)
    plain = load(lora=None)
    plain.unet = loaded["pipe"].unet.eval()
    torch.testing.assert_close(predict(plain), predict(model), rtol=0, atol=1e-5)
    exec(settings.model_copy(update={"prediction_type": "v_prediction"}).usage(adapter), loaded)
    assert loaded["pipe"].scheduler.config.prediction_type == "v_prediction"
    file = tmp_path / "base" / "b.safetensors"
    file.parent.mkdir()
    file.touch()
    for base, shown in (("gone.safetensors", "gone.safetensors"), (str(file.parent), str(file))):
        text = settings.model_copy(update={"pretrained": base}).usage(adapter)
        assert f"pipe = StableDiffusionPipeline.from_single_file({shown!r})\n" in text


def test_the_rank_does_not_grow_unasked(old: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    second = train(load(old, Lora()), 2)
    assert not capsys.readouterr().out
    assert ranks_of(second.save(tmp_path / "second")) == {"to_q": 3, "net.0.proj": 3, "conv1": 3}
    third = load(tmp_path / "second", Lora(rank=4, alpha=9, targets=("conv1", "to_v")))
    torch.testing.assert_close(reference(third), predict(second), rtol=0, atol=1e-5)
    assert torch.equal(reference(third), predict(third))
    saved = train(third, 3).save(tmp_path / "third")
    torch.testing.assert_close(by_diffusers(saved), predict(third), rtol=0, atol=1e-5)
    assert ranks_of(saved) == {"to_q": 4, "net.0.proj": 4, "conv1": 4, "to_v": 4}
    capsys.readouterr()
    fourth = load(tmp_path / "third", Lora(rank=2))
    assert "model.lora.rank=2, and the LoRA that training starts from keeps its rank, 4" in capsys.readouterr().out
    assert torch.equal(reference(fourth), predict(fourth))
    torch.testing.assert_close(reference(fourth), predict(third), rtol=0, atol=1e-5)
    assert set(ranks_of(fourth.save(tmp_path / "fourth")).values()) == {4}


def ranks_of(saved: Path) -> dict[str, int]:
    """The ranks of a saved LoRA, by the layer's last name."""
    ranks = {name: len(value) for name, value in load_file(saved / LORA_FILE).items() if ".lora_A." in name}
    return {
        name.split(".lora_")[0].removesuffix(".0").rpartition(".")[2].replace("proj", "net.0.proj"): r
        for name, r in ranks.items()
    }


def test_equal_weights_are_equal_bytes(old: Path, tmp_path: Path) -> None:
    model = train(load(old), 2)
    first, second = (model.save(tmp_path / name) / LORA_FILE for name in "ab")
    assert first.read_bytes() == second.read_bytes()
    metadata = read_lora(tmp_path / "a")[1]
    assert json.loads(metadata["lora_adapter_metadata"])["unet.target_modules"] == sorted(
        {name.split(".lora_")[0].removeprefix("unet.") for name in load_file(first)}
    )
    header = first.read_bytes()[8:].split(b"}", 1)[0].decode()
    assert header.index('"format"') < header.index('"lora_adapter_metadata"'), "safetensors has them in any order"


@pytest.mark.parametrize("lora", [NEW, Lora(alpha=2)], ids=["other", "continued"])
def test_a_result_means_the_same_to_tools_that_read_no_header(old: Path, tmp_path: Path, lora: Lora) -> None:
    """Without its header a LoRA is taken to have alpha = rank; diffusers 0.31 and 0.32 read none."""
    model = train(load(old, lora), 2)
    file = model.save(tmp_path) / LORA_FILE
    save_file(load_file(file), file)
    torch.testing.assert_close(by_diffusers(tmp_path / "adapter"), predict(model), rtol=0, atol=1e-5)


def test_previews_are_drawn_with_all_of_the_policy(any_old: Path, tmp_path: Path) -> None:
    model = train(load(any_old), 2)
    model.save(tmp_path)
    requests, sampling = [DrawRequest("a red circle", 0)], Sampling(num_inference_steps=3)
    preview, started, base = (
        np.asarray(draw(pipeline, requests, sampling)[0]).astype(int)
        for pipeline in (
            model.pipeline,
            load_pipeline(ImageModel(adapter_path=any_old), device=CPU, dtype=torch.float32),
            load_pipeline(ImageModel(), device=CPU, dtype=torch.float32),
        )
    )
    result = load_pipeline(ImageModel(adapter_path=tmp_path), device=CPU, dtype=torch.float32)
    (drawn,) = draw(result, requests, sampling)
    assert abs(np.asarray(drawn) - preview).max() <= 1
    assert abs(preview - started).max() > 3
    assert abs(preview - base).max() > 3


def test_a_start_is_not_rounded_and_drops_nothing_out(old: Path, tmp_path: Path) -> None:
    """Its file may ask for dropout, which was for its own training."""
    edit_header(old, tmp_path, lora_dropout=0.5)
    model = load(tmp_path, Lora(), dtype=torch.bfloat16)
    assert model.unet.conv_in.weight.dtype == torch.bfloat16
    weights = load_file(old / "adapter" / LORA_FILE)
    started = {n: p for n, p in model.unet.named_parameters() if ".start." in n}
    assert len(started) == len(weights)
    for name, parameter in started.items():
        assert torch.equal(parameter, weights["unet." + name.replace(".start.", ".")])
    assert torch.equal(reference(model), reference(model))
    dropouts = [m for n, m in model.unet.named_modules() if ".lora_dropout." in n]
    assert {type(m) for m in dropouts} == {torch.nn.Identity}


def test_a_full_unet_as_a_start_is_not_rounded(old_unet: Path) -> None:
    model = load(old_unet, dtype=torch.bfloat16)
    assert model.unet.conv_in.weight.dtype == torch.float32
    assert model.pipeline.unet is model.unet
    predict(model)
    train(model, 2)


@pytest.mark.parametrize("spelling", ["kohya", "processors", "mixed"])
def test_loras_of_other_tools_start_training_too(tmp_path: Path, spelling: str) -> None:
    lora = Lora(rank=3, targets=("to_q", "to_out.0", "conv1") if spelling == "mixed" else ("to_q", "to_out.0"))
    model = train(load(lora=lora), 1)
    weights = load_file(model.save(tmp_path) / LORA_FILE)
    renamed = {}
    for name, value in weights.items():
        path, _, which = name.removeprefix("unet.").removesuffix(".weight").rpartition(".lora_")
        which = {"A": "down", "B": "up"}[which]
        if spelling == "kohya":
            renamed[f"lora_unet_{path.replace('.', '_')}.lora_{which}.weight"] = value
            renamed[f"lora_unet_{path.replace('.', '_')}.alpha"] = torch.tensor(1.5)
        elif spelling == "processors":
            block, _, layer = path.removesuffix(".0").rpartition(".")
            renamed[f"unet.{block}.processor.{layer}_lora.{which}.weight"] = value
        else:  # as we wrote them once: attention in one spelling, the rest in another, and the rest first
            renamed[f"unet.{path}.lora.{which}.weight" if "to_" in path else name] = value
    save_file(renamed, tmp_path / "other.safetensors")
    for layer in peft_layers(model.unet).values():
        layer.scaling["default"] = 0.5 if spelling == "kohya" else 1.0
    torch.testing.assert_close(reference(load(tmp_path / "other.safetensors")), predict(model), rtol=0, atol=1e-5)


def test_the_hash_of_the_base_covers_the_start(old: Path, old_unet: Path, tmp_path: Path) -> None:
    bare = load().base_hash
    assert bare == load(lora=Lora(rank=7)).base_hash == load(lora=None).base_hash
    shutil.copytree(old, tmp_path / "copy")
    start = load(old).base_hash
    assert start == load(tmp_path / "copy").base_hash == load(old, None).base_hash
    train(load(lora=OLD), 9).save(tmp_path / "other")
    edit_header(old, tmp_path / "louder", lora_alpha=6)
    hashes = [load(path).base_hash for path in (tmp_path / "other", tmp_path / "louder", old_unet)]
    assert len({bare, start, *hashes}) == 5


def test_every_tensor_of_a_start_and_its_strength_are_in_its_hash() -> None:
    down, up = torch.rand(2, 6), torch.rand(6, 2)
    layers = [LoraLayer(down, up, 1.0), LoraLayer(2 * down, up, 1.0), LoraLayer(down, 2 * up, 1.0)]
    layers += [LoraLayer(down, up, 2.0), LoraLayer(down.view(2, 3, 2), up, 1.0)]
    one, *others = [Start({"b": layer, "a": layer}, {"text_encoder": {"c": layer}}) for layer in layers]
    assert one.facts("unet") == Start({"a": layers[0], "b": layers[0]}).facts("unet")
    names = [[fact.rpartition(" ")[0] for fact in one.facts(part)] for part in ("unet", "text_encoder")]
    assert names == [["unet.a", "unet.b"], ["text_encoder.c"]]
    for part in ("unet", "text_encoder"):
        assert len({tuple(start.facts(part)) for start in (one, *others)}) == len(layers)


def test_what_hides_the_pretrained_model_is_named() -> None:
    layer = {"a": LoraLayer(torch.ones(1, 2), torch.ones(2, 1), 1.0)}
    whole, unet, text = Start(kind="unet"), Start(layer, {}, "lora"), Start({}, {"text_encoder": layer}, "lora")
    both = Start(layer, {"text_encoder": layer}, "lora")
    for is_lora in (True, False):
        assert Start().lost(is_lora=is_lora) == ""
        assert "starts from a whole UNet" in whole.lost(is_lora=is_lora)
        assert "encodes the prompts" in text.lost(is_lora=is_lora)
    assert unet.lost(is_lora=True) == ""
    assert "encodes the prompts" in both.lost(is_lora=True)
    assert "part of the weights that are trained" in unet.lost(is_lora=False)
    assert "part of the weights that are trained" in both.lost(is_lora=False)


def test_what_a_start_has_for_the_text_encoder_encodes_the_prompts_and_is_kept(
    old: Path, tmp_path: Path, diffusers_log: pytest.LogCaptureFixture
) -> None:
    weights, metadata = read_lora(old)
    layer = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
    generator = torch.Generator().manual_seed(0)
    text = {
        f"{layer}.lora_linear_layer.{way}.weight": torch.randn(64, 64, generator=generator) for way in ("up", "down")
    }
    write_lora(tmp_path, weights | text, metadata)
    model, plain = load(tmp_path), load(old)
    assert model.base_hash == plain.base_hash and model.encoder_hash != plain.encoder_hash
    encoded, before = (it.encode_prompts(["a red circle"])["encoder_hidden_states"] for it in (model, plain))
    assert (encoded - before).abs().max() > 0.1
    assert not any("text" in name for name in model.trainable())
    saved = load_file(train(model, 2).save(tmp_path / "out") / LORA_FILE)
    assert torch.equal(saved[f"{layer}.lora_A.weight"], text[f"{layer}.lora_linear_layer.down.weight"])
    assert torch.equal(saved[f"{layer}.lora_B.weight"], text[f"{layer}.lora_linear_layer.up.weight"])
    again = load(tmp_path / "out")
    assert torch.equal(again.encode_prompts(["a red circle"])["encoder_hidden_states"], encoded)
    assert again.encoder_hash == model.encoder_hash
    assert not diffusers_log.records
    with pytest.raises(ConfigError, match=r"layers for the text encoder, which a whole UNet \(model\.lora=null\)"):
        load(tmp_path, None)


def test_a_start_of_the_text_encoder_alone_begins_with_a_fresh_lora(tmp_path: Path) -> None:
    text = {
        f"lora_te_text_model_encoder_layers_1_mlp_fc1.lora_{way}.weight": torch.ones(*shape)
        for way, shape in (("up", (256, 2)), ("down", (2, 64)))
    }
    save_file(text, tmp_path / "te.safetensors")
    model = load(tmp_path / "te.safetensors")
    assert list(model.trainable()) == list(load().trainable())
    fresh = load(lora=Lora()).trainable()
    assert {len(value) for name, value in fresh.items() if ".lora_A." in name} == {8}, "as the documents say"
    assert {name.split(".lora_")[0].split(".attn")[1][2:] for name in fresh} == {"to_q", "to_k", "to_v", "to_out.0"}
    assert model.base_hash == load().base_hash and model.encoder_hash != load().encoder_hash


def test_a_lora_without_text_encoder_says_nothing(
    old: Path,
    capsys: pytest.CaptureFixture[str],
    recwarn: pytest.WarningsRecorder,
    diffusers_log: pytest.LogCaptureFixture,
) -> None:
    load(old, Lora())
    load(old, None)
    assert (capsys.readouterr().out, diffusers_log.text, [str(warning.message) for warning in recwarn]) == ("", "", [])


FAULTS = {
    "family": "does not fit",
    "shapes": "does not fit",
    "partly": "does not fit this model: 1 of its [0-9]+ layers find none in it, e.g. unet.down_blocks.7.to_q",
    "half": "without the rest of it",
    "transformer": "is a LoRA for a transformer",
    "text": "does not fit this model: [0-9]+ of its [0-9]+ layers find none in it",
    "dora": "plain LoRAs",
    "bias": "plain LoRAs",
    "none": "is no LoRA and no checkpoint: it holds unet.conv_in.weight",
    "empty": "is no LoRA and no checkpoint: it holds no tensors",
    "truncated": "is cut off",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_lora_that_cannot_be_used_is_refused_in_one_sentence(
    old: Path, tmp_path: Path, fault: str, diffusers_log: pytest.LogCaptureFixture
) -> None:
    weights, metadata = read_lora(old)
    name = next(iter(weights))
    edits = {
        "family": lambda: {key.replace("blocks", "stages"): value for key, value in weights.items()},
        "shapes": lambda: {key: torch.cat([value, value], dim=int("lora_A" in key)) for key, value in weights.items()},
        "partly": lambda: weights | {f"unet.down_blocks.7.to_q.lora_{it}.weight": torch.ones(3, 3) for it in "AB"},
        "half": lambda: {key: value for key, value in weights.items() if key != name},
        "transformer": lambda: {key.replace("unet.", "transformer."): value for key, value in weights.items()},
        "text": lambda: {key.replace("unet.", "text_encoder."): value for key, value in weights.items()},
        "dora": lambda: weights | {name.split(".lora_")[0] + ".lora_magnitude_vector": torch.ones(64)},
        "bias": lambda: weights | {name.split(".lora_")[0] + ".lora_B.bias": torch.ones(64)},
        "none": lambda: {"unet.conv_in.weight": torch.ones(1)},
        "empty": dict,
    }
    keeps_header = fault not in ("none", "empty")
    write_lora(tmp_path, edits.get(fault, lambda: weights)(), metadata if keeps_header else {"format": "pt"})
    file = tmp_path / "adapter" / LORA_FILE
    if fault == "truncated":
        file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ConfigError, match=FAULTS[fault]) as caught:
        load(tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500 + len(str(tmp_path))
    assert not diffusers_log.records


@pytest.mark.parametrize("fault", ["family", "truncated", "config"])
def test_a_unet_that_cannot_be_used_is_refused_in_one_sentence(old_unet: Path, tmp_path: Path, fault: str) -> None:
    if fault == "family":
        make_stable_diffusion(tmp_path / "other")
        shutil.copytree(tmp_path / "other" / "unet", tmp_path / "unet")
    else:
        shutil.copytree(old_unet, tmp_path, dirs_exist_ok=True)
        name = {"truncated": "diffusion_pytorch_model.safetensors", "config": "config.json"}[fault]
        path = tmp_path / "unet" / name
        path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ConfigError, match="does not fit" if fault == "family" else "cannot load") as caught:
        load(tmp_path)
    assert str(tmp_path / "unet") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_start_is_noticed_before_the_model_is_loaded(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nowhere does not exist"):
        load(tmp_path / "nowhere", base="no/such/model")


def read_lora(run: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    file = run / "adapter" / LORA_FILE
    with safe_open(file, "pt") as opened:
        return load_file(file), opened.metadata()


def write_lora(run: Path, weights: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    (run / "adapter").mkdir(parents=True, exist_ok=True)
    save_file(weights, run / "adapter" / LORA_FILE, metadata=metadata)


def edit_header(run: Path, to: Path, **changes: object) -> None:
    """Copy a LoRA with some of peft's settings changed."""
    weights, metadata = read_lora(run)
    settings = json.loads(metadata["lora_adapter_metadata"])
    settings |= {f"unet.{key}": value for key, value in changes.items()}
    assert settings != json.loads(metadata["lora_adapter_metadata"])
    write_lora(to, weights, metadata | {"lora_adapter_metadata": json.dumps(settings)})
