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
from diffusion_dpo.models.adapters import LORA_FILE, lora_layers
from diffusion_dpo.models.stable_diffusion import LoadedStableDiffusion, StableDiffusion
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


def test_only_the_new_lora_is_trained(old: Path) -> None:
    model = load(old)
    assert list(model.trainable()) == list(load().trainable())
    noisy, timesteps = torch.randn(2, 4, 8, 8), torch.tensor([10, 900])
    model.predict(noisy, timesteps, model.encode_prompts(["a", "b"])).pow(2).mean().backward()
    graded = {name for name, parameter in model.unet.named_parameters() if parameter.grad is not None}
    assert graded == set(model.trainable())
    assert {parameter.dtype for parameter in model.trainable().values()} == {torch.float32}


def test_the_seed_alone_decides_how_the_new_lora_begins(old: Path) -> None:
    first, again, other = load(), load(old), load(old, seed=1)
    assert all(torch.equal(parameter, again.trainable()[name]) for name, parameter in first.trainable().items())
    assert any(not torch.equal(parameter, other.trainable()[name]) for name, parameter in first.trainable().items())


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
    exec(settings.usage(str(model.save(tmp_path))), loaded)
    plain = load(lora=None)
    plain.unet = loaded["pipe"].unet.eval()
    torch.testing.assert_close(predict(plain), predict(model), rtol=0, atol=1e-5)


def test_a_saved_sum_is_a_start_again(old: Path, tmp_path: Path) -> None:
    second = train(load(old), 2)
    second.save(tmp_path / "second")
    third = load(tmp_path / "second", Lora(rank=1, targets=("conv1", "to_v")))
    torch.testing.assert_close(reference(third), predict(second), rtol=0, atol=1e-5)
    saved = train(third, 3).save(tmp_path / "third")
    torch.testing.assert_close(by_diffusers(saved), predict(third), rtol=0, atol=1e-5)
    ranks = {name: len(value) for name, value in load_file(saved / LORA_FILE).items() if ".lora_A." in name}
    assert {rank for name, rank in ranks.items() if "to_q" in name} == {3 + 2}
    assert {rank for name, rank in ranks.items() if "conv1" in name} == {3 + 1}


def test_a_sum_means_the_same_to_tools_that_read_no_header(old: Path, tmp_path: Path) -> None:
    """Without its header a LoRA is taken to have alpha = rank."""
    model = train(load(old), 2)
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
    model = load(tmp_path, dtype=torch.bfloat16)
    assert model.unet.conv_in.weight.dtype == torch.bfloat16
    weights = load_file(old / "adapter" / LORA_FILE)
    started = {n: p for n, p in model.unet.named_parameters() if ".start." in n}
    assert len(started) == len(weights)
    for name, parameter in started.items():
        assert torch.equal(parameter, weights["unet." + name.replace(".start.", ".")])
    assert torch.equal(reference(model), reference(model))
    dropouts = [m for n, m in model.unet.named_modules() if n.endswith("lora_dropout.start")]
    assert {type(m) for m in dropouts} == {torch.nn.Dropout}
    assert not any(m.training for m in dropouts)


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
    for layer in lora_layers(model.unet).values():
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


def test_only_the_unets_part_of_a_lora_is_used_and_that_is_said_once(
    old: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], diffusers_log: pytest.LogCaptureFixture
) -> None:
    weights, metadata = read_lora(old)
    text = {
        f"text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_linear_layer.{way}.weight"
        for way in ("up", "down")
    }
    write_lora(tmp_path, weights | {name: torch.ones(64, 64) for name in text}, metadata)
    plain = load(old)
    capsys.readouterr()
    model = load(tmp_path)
    assert capsys.readouterr().out.count("warning: only the UNet's part") == 1
    assert torch.equal(reference(model), reference(plain))
    assert (model.base_hash, model.encoder_hash) == (plain.base_hash, plain.encoder_hash)
    assert not diffusers_log.records


def test_a_lora_without_text_encoder_says_nothing(
    old: Path,
    capsys: pytest.CaptureFixture[str],
    recwarn: pytest.WarningsRecorder,
    diffusers_log: pytest.LogCaptureFixture,
) -> None:
    load(old)
    load(old, None)
    assert (capsys.readouterr().out, diffusers_log.text, [str(warning.message) for warning in recwarn]) == ("", "", [])


FAULTS = {
    "family": "does not fit",
    "shapes": "does not fit",
    "partly": "does not fit",
    "half": "does not fit",
    "transformer": "does not fit this model: its weights are for transformer",
    "text": "has nothing for the UNet",
    "dora": "plain LoRAs",
    "none": "holds weights that are no LoRA",
    "empty": "its weights are for nothing",
    "truncated": "cannot read the LoRA",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_lora_that_cannot_be_used_is_refused_in_one_sentence(
    old: Path, tmp_path: Path, fault: str, diffusers_log: pytest.LogCaptureFixture
) -> None:
    weights, metadata = read_lora(old)
    name = next(iter(weights))
    edits = {
        "family": lambda: {key.replace("blocks", "stages"): value for key, value in weights.items()},
        "shapes": lambda: {key: torch.cat([value, value], dim=1) for key, value in weights.items()},
        "partly": lambda: weights | {"unet.down_blocks.7.to_q.lora_A.weight": torch.ones(3, 64)},
        "half": lambda: {key: value for key, value in weights.items() if key != name},
        "transformer": lambda: {key.replace("unet.", "transformer."): value for key, value in weights.items()},
        "text": lambda: {key.replace("unet.", "text_encoder."): value for key, value in weights.items()},
        "dora": lambda: weights | {name.split(".lora_")[0] + ".lora_magnitude_vector": torch.ones(64)},
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
        make_stable_diffusion(tmp_path)
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
