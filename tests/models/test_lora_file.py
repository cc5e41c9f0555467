"""The reader of LoRA files: every spelling and every place of alpha, exactly; every other kind of file, by name."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from peft import LoraConfig
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from diffusion_dpo.cli import main
from diffusion_dpo.config import ConfigError
from diffusion_dpo.models.adapters import add_adapter, find_adapter
from diffusion_dpo.models.lora_file import LoraLayer, place, read_lora, recognise
from diffusion_dpo.models.lora_layers import add_to_weights, added, parts_of, peft_layers, put_on, read_back
from diffusion_dpo.models.lora_write import packed, write_lora
from diffusion_dpo.sampling import adapter_hash
from tests.fakes import make_stable_diffusion, make_stable_diffusion_xl
from tests.models.lora_files import SPELLINGS, factors, kohya, plain, product, save, targets, tucker, with_alphas

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
LAYERS = (
    *ATTENTION,
    "conv1",
    "conv_in",
    "conv_out",
    "conv_shortcut",
    "samplers.0.conv",
    "proj_in",
    "ff.net.2",
    "time_emb_proj",
)
TIMES = ("time_embedding.linear_1", "time_embedding.linear_2", "add_embedding.linear_1", "add_embedding.linear_2")


@pytest.fixture(scope="module")
def sd(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return StableDiffusionPipeline.from_pretrained(make_stable_diffusion(tmp_path_factory.mktemp("sd")))


@pytest.fixture(scope="module")
def xl(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return StableDiffusionXLPipeline.from_pretrained(make_stable_diffusion_xl(tmp_path_factory.mktemp("xl")))


def deltas(pipeline: Any, file: Path, part: str = "unet") -> dict[str, torch.Tensor]:
    return {path: layer.delta() for path, layer in place(read_lora(file), parts_of(pipeline))[part].items()}


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    assert found.keys() == expected.keys() and found
    for path, delta in expected.items():
        torch.testing.assert_close(found[path], delta, rtol=1e-5, atol=1e-6, msg=path)
    return True


# --- names ---


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_of_a_layer_is_found(sd: Any, tmp_path: Path, spelling: str) -> None:
    weights, expected = plain(sd.unet, ATTENTION if "2023" in spelling else LAYERS, spelling)
    assert same(deltas(sd, save(tmp_path, weights)), expected)


ORIGINAL = {
    "down_blocks.0.resnets.0.conv1": "input_blocks_1_0_in_layers_2",
    "down_blocks.0.resnets.0.conv2": "input_blocks_1_0_out_layers_3",
    "down_blocks.0.resnets.0.time_emb_proj": "input_blocks_1_0_emb_layers_1",
    "down_blocks.0.downsamplers.0.conv": "input_blocks_2_0_op",
    "down_blocks.1.attentions.0.transformer_blocks.0.ff.net.2": "input_blocks_3_1_transformer_blocks_0_ff_net_2",
    "down_blocks.1.attentions.0.proj_in": "input_blocks_3_1_proj_in",
    "down_blocks.1.resnets.0.conv_shortcut": "input_blocks_3_0_skip_connection",
    "mid_block.attentions.0.transformer_blocks.1.attn1.to_out.0": "middle_block_1_transformer_blocks_1_attn1_to_out_0",
    "mid_block.resnets.1.conv1": "middle_block_2_in_layers_2",
    "up_blocks.0.attentions.1.transformer_blocks.0.attn2.to_k": "output_blocks_1_1_transformer_blocks_0_attn2_to_k",
    "up_blocks.0.upsamplers.0.conv": "output_blocks_1_2_conv",
    "conv_in": "input_blocks_0_0",
    "conv_out": "out_2",
    "time_embedding.linear_1": "time_embed_0",
    "add_embedding.linear_2": "label_emb_0_2",
}
"""Of the tiny SDXL, by hand."""


@pytest.mark.parametrize(("prefix", "dotted"), [("lora_unet_", False), ("diffusion_model.", True)])
def test_the_original_names_of_sdxls_layers_are_found_with_their_alphas(
    xl: Any, tmp_path: Path, prefix: str, dotted: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    weights, expected = {}, {}
    for seed, (path, name) in enumerate(ORIGINAL.items()):
        down, up = factors(xl.unet.get_submodule(path), 4, seed)
        key = prefix + name
        if dotted:
            spelled = {"input_blocks_": "input_blocks.", "output_blocks_": "output_blocks.", "out_2": "out.2"}
            key = next((prefix + name.replace(a, b) for a, b in spelled.items() if name.startswith(a)), key)
        weights |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up, f"{key}.alpha": torch.tensor(1.0)}
        expected[path] = product(up, down, 1 / 4)
    file = save(tmp_path, weights)
    assert same(deltas(xl, file), expected)
    assert main(["export", "--check", str(file)]) == 0
    out = capsys.readouterr().out
    assert "alpha 1\n" in out and "warning" not in out


@pytest.mark.parametrize(
    ("spelling", "part"),
    [
        ("lora_te1_text_model_encoder_layers_{}_mlp_fc1.lora_{}.weight", "text_encoder"),
        ("lora_te2_text_model_encoder_layers_{}_mlp_fc1.lora_{}.weight", "text_encoder_2"),
        ("lora_te_wrapped_transformer_text_model_encoder_layers_{}_mlp_fc1.lora_{}.weight", "text_encoder"),
        ("text_encoder_2.text_model.encoder.layers.{}.mlp.fc1.lora_linear_layer.{}.weight", "text_encoder_2"),
        ("text_encoder.encoder.layers.{}.mlp.fc1.lora.{}.weight", "text_encoder"),
        ("clip_g.transformer.text_model.encoder.layers.{}.mlp.fc1.lora_{}.weight", "text_encoder_2"),
        ("text_encoders.clip_l.transformer.text_model.encoder.layers.{}.mlp.fc1.lora_{}.weight", "text_encoder"),
        ("base_model.model.text_model.encoder.layers.{}.mlp.fc1.lora_{}.weight", "text_encoder"),
    ],
)
def test_layers_of_text_encoders_are_found(xl: Any, tmp_path: Path, spelling: str, part: str) -> None:
    fc1 = targets(getattr(xl, part), "fc1")
    weights, expected = {}, {}
    for number, (path, module) in enumerate(fc1.items()):
        down, up = factors(module, 2, number)
        weights |= {spelling.format(number, way): value for way, value in (("down", down), ("up", up))}
        expected[path] = product(up, down, 1.0)
    assert same(deltas(xl, save(tmp_path, weights), part), expected)


def test_attention_of_a_text_encoder_in_the_names_of_2023(sd: Any, tmp_path: Path) -> None:
    (path, module), *_ = targets(sd.text_encoder, "q_proj").items()
    down, up = factors(module, 2, 0)
    name = "text_encoder.text_model.encoder.layers.0.self_attn.to_q_lora"
    file = save(tmp_path, {f"{name}.down.weight": down, f"{name}.up.weight": up})
    assert same(deltas(sd, file, "text_encoder"), {path: product(up, down, 1.0)})


# --- strengths ---


def test_each_layer_has_its_own_alpha_and_rank(sd: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Kohya's blocks, and layers without one, whose alpha is their rank."""
    weights, expected = with_alphas(sd.unet, LAYERS, lambda k: (None, 1, 0.7, 5)[k % 4], lambda k: 2 + k % 3)
    file = save(tmp_path, weights)
    assert same(deltas(sd, file), expected)
    assert main(["export", "--check", str(file)]) == 0
    assert f"{-(-len(expected) // 4)} of {len(expected)} layers have no alpha" in capsys.readouterr().out


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float64])
def test_the_number_format_of_a_file_changes_nothing(sd: Any, tmp_path: Path, dtype: torch.dtype) -> None:
    weights, _ = with_alphas(sd.unet, ("to_q",), lambda k: 0.5)
    rounded = {key: value.to(dtype) if "lora_" in key[10:] else value for key, value in weights.items()}
    exact = save(tmp_path, {key: value.float() for key, value in rounded.items()}, "exact.safetensors")
    assert same(deltas(sd, save(tmp_path, rounded)), deltas(sd, exact))


@pytest.mark.parametrize("where", ["header", "folder"])
@pytest.mark.parametrize("rslora", [False, True])
def test_pefts_settings_give_the_strengths_that_peft_itself_has(
    sd: Any, tmp_path: Path, where: str, rslora: bool
) -> None:
    queries, keys, values = (list(targets(sd.unet, end)) for end in ("to_q", "to_k", "to_v"))
    exact = {queries[0]: 13, keys[0]: 9, f"^{keys[1]}": 10, f"^{values[0]}": 11}
    patterns = {  # the first of those that match a layer is its own, an exact one or not
        "rank_pattern": {"to_k": 3, "mid_block.*to_v": 4},
        "alpha_pattern": {"to_q": 7, **exact, "down_blocks.*to_v": 2},
    }
    config = LoraConfig(r=2, lora_alpha=5, target_modules=["to_q", "to_k", "to_v"], use_rslora=rslora, **patterns)
    sd.unet.add_adapter(config, "made")
    scalings = {path: place.scaling["made"] for path, place in peft_layers(sd.unet).items()}
    ranks = {path: place.r["made"] for path, place in peft_layers(sd.unet).items()}
    sd.unet.unload_lora()
    assert len(set(scalings.values())) > 2
    weights, expected = {}, {}
    for seed, (path, scale) in enumerate(scalings.items()):
        down, up = factors(sd.unet.get_submodule(path), ranks[path], seed)
        name = f"unet.{path}" if where == "header" else f"base_model.model.{path}"
        weights |= {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
        expected[path] = product(up, down, scale)
    settings = {key: value for key, value in config.to_dict().items() if not isinstance(value, set)}
    if where == "header":
        path = save(tmp_path, weights, lora_adapter_metadata={f"unet.{key}": value for key, value in settings.items()})
    else:
        save(tmp_path, weights, "adapter_model.safetensors")
        (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
        path = tmp_path
        before = adapter_hash(path)
    assert same(deltas(sd, find_adapter(path)[1]), expected)
    if where == "folder":
        (tmp_path / "adapter_config.json").write_text(json.dumps(settings | {"lora_alpha": 6}))
        assert adapter_hash(path) != before, "another alpha is another adapter"


def test_a_tucker_decomposition_is_a_lora(sd: Any, tmp_path: Path) -> None:
    weights, expected = tucker(sd.unet, ("conv1", "conv2"))
    assert same(deltas(sd, save(tmp_path, weights)), expected)


def test_bundled_embeddings_are_left_out_and_named(
    sd: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights, expected = plain(sd.unet, ("to_q",))
    file = save(tmp_path, weights | {"bundle_emb.my token.string_to_param.*": torch.ones(2, 32)})
    assert same(deltas(sd, file), expected)
    assert "bundles the embedding my token, which is left out" in capsys.readouterr().out


# --- on a model ---


def test_beside_the_weights_and_within_them_a_lora_computes_the_same(sd: Any, tmp_path: Path) -> None:
    weights, expected = with_alphas(sd.unet, LAYERS, lambda k: 1 + k % 3, lambda k: 2 + k % 2)
    text = {
        kohya("lora_te_", f"text_model.{path.removeprefix('text_model.')}"): module
        for path, module in targets(sd.text_encoder, "fc1").items()
    }
    for seed, (name, module) in enumerate(text.items()):
        down, up = factors(module, 2, seed)
        weights |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
    file = save(tmp_path, weights)
    layers = place(read_lora(file), parts_of(sd))
    before = {path: sd.unet.get_submodule(path).weight.clone() for path in expected}
    asked = sd.tokenizer("a fox", return_tensors="pt").input_ids
    noisy, time, prompt = torch.randn(1, 4, 8, 8), torch.tensor([500]), torch.randn(1, 16, 32)

    def answers() -> list[torch.Tensor]:
        with torch.no_grad():
            return [sd.unet(noisy, time, prompt).sample, sd.text_encoder(asked).last_hidden_state]

    base = answers()
    with added(parts_of(sd), layers):
        for path, delta in expected.items():
            torch.testing.assert_close(sd.unet.get_submodule(path).weight, before[path] + delta, rtol=1e-5, atol=1e-5)
        within = answers()
    assert all(torch.equal(sd.unet.get_submodule(path).weight, weight) for path, weight in before.items())
    add_adapter(sd, file)
    beside = answers()
    sd.unload_lora_weights()
    for was, one, other in zip(base, within, beside, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
        assert (one - was).abs().max() > 0.05
    assert all(torch.equal(one, other) for one, other in zip(base, answers(), strict=True))


def test_a_dora_of_peft_is_merged_by_its_equation(sd: Any, tmp_path: Path) -> None:
    """Equation 5 of the paper, with the norm of each row; peft's own layer computes the same."""
    weights, expected = {}, {}
    for seed, (path, module) in enumerate(targets(sd.unet, "to_q", "conv1").items()):
        down, up = factors(module, 2, seed)
        rows = torch.rand(len(up), generator=torch.Generator().manual_seed(seed)) + 0.5
        magnitude = rows if down.ndim == 2 else rows.view(1, -1, 1, 1)
        weights |= {f"unet.{path}.lora_A.weight": down, f"unet.{path}.lora_B.weight": up}
        weights[f"unet.{path}.lora_magnitude_vector"] = magnitude
        changed = module.weight.detach().double() + product(up, down, 1.0).double()
        shape = (-1, *[1] * (changed.ndim - 1))
        expected[path] = rows.double().view(shape) * changed / changed.flatten(1).norm(dim=1).view(shape)
    file = save(tmp_path, weights)
    layers, kept = place(read_lora(file), parts_of(sd)), sd.unet.state_dict()
    kept = {key: value.clone() for key, value in kept.items()}
    inputs = (torch.randn(1, 4, 8, 8), torch.tensor([500]), torch.randn(1, 16, 32))
    add_adapter(sd, file)
    with torch.no_grad():
        beside = sd.unet(*inputs).sample
    sd.unload_lora_weights()
    add_to_weights(parts_of(sd), layers)
    for path, weight in expected.items():
        torch.testing.assert_close(sd.unet.get_submodule(path).weight, weight.float(), rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(sd.unet(*inputs).sample, beside, rtol=1e-4, atol=1e-4)
    sd.unet.load_state_dict(kept)


@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed")
def test_biases_and_a_scale_act_beside_the_weights_as_within_them(sd: Any, tmp_path: Path) -> None:
    """W + c s B A and b + c s b', on layers with and without a bias, at c = 0.5 and s = 3 / 2."""
    weights, expected = {}, {}
    for seed, (path, module) in enumerate(targets(sd.unet, "attn1.to_q", "ff.net.2", "conv1").items()):
        down, up = factors(module, 2, seed)
        bias = torch.randn(len(up), generator=torch.Generator().manual_seed(seed))
        weights |= {f"unet.{path}.lora_A.weight": down, f"unet.{path}.lora_B.weight": up}
        if seed % 3:
            weights[f"unet.{path}.lora_B.bias"] = bias
        before = torch.zeros(len(up)) if module.bias is None else module.bias.detach()
        expected[path] = (
            module.weight.detach() + product(up, down, 0.75),
            before + 0.75 * bias if seed % 3 else module.bias,
        )
    file = save(tmp_path, weights, lora_adapter_metadata={"unet.r": 2, "unet.lora_alpha": 3})
    parts = parts_of(sd)
    layers = place(read_lora(file), parts)
    kept = {path: sd.unet.get_submodule(path).bias for path in expected}
    assert any(bias is None for bias in kept.values()) and not all(bias is None for bias in kept.values())
    inputs = (torch.randn(1, 4, 8, 8), torch.tensor([500]), torch.randn(1, 16, 32))
    add_adapter(sd, file, scale=0.5)
    with torch.no_grad():
        beside = sd.unet(*inputs).sample
    for path, layer in read_back(parts, "adapter")["unet"].items():
        assert layer.rank == 2 and layer.alpha == pytest.approx(1.5), "s is the strength that is set"
        assert layer.bias is not None and layer.bias.eq(weights.get(f"unet.{path}.lora_B.bias", 0)).all()
    sd.unload_lora_weights()
    with added(parts, layers):
        assert all(
            sd.unet.get_submodule(path).bias is not bias
            for path, bias in kept.items()
            if layers["unet"][path].bias is not None
        )
    assert all(sd.unet.get_submodule(path).bias is bias for path, bias in kept.items())
    before = {path: sd.unet.get_submodule(path).weight.detach().clone() for path in expected}
    add_to_weights(parts, layers, scale=0.5)
    for path, (weight, bias) in expected.items():
        module = sd.unet.get_submodule(path)
        torch.testing.assert_close(module.weight, weight, rtol=1e-5, atol=1e-5, check_dtype=False)
        assert (module.bias is None) == (bias is None)
        if bias is not None:
            torch.testing.assert_close(module.bias.detach(), bias.detach(), rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        torch.testing.assert_close(sd.unet(*inputs).sample, beside, rtol=1e-4, atol=1e-4)
    for path, weight in before.items():
        module = sd.unet.get_submodule(path)
        module.weight.data.copy_(weight)
        module.bias = kept[path]


def test_a_lora_beside_the_weights_is_frozen_and_a_copy_at_its_own_strength(sd: Any, tmp_path: Path) -> None:
    weights, _ = with_alphas(sd.unet, ("attn1.to_q",), lambda _: 5)
    layers = place(read_lora(save(tmp_path, weights)), parts_of(sd))
    kept = {path: layer.delta() for path, layer in layers["unet"].items()}
    put_on(parts_of(sd), layers, "one")
    read = read_back(parts_of(sd), "one")["unet"]
    assert same({path: layer.delta() for path, layer in read.items()}, kept)
    parameters = {name: it for name, it in sd.unet.named_parameters() if ".one." in name}
    assert len(parameters) == 2 * len(kept) and not any(it.requires_grad for it in parameters.values())
    for parameter in parameters.values():
        parameter.data.zero_()
    sd.unload_lora_weights()
    assert all(torch.equal(layer.delta(), kept[path]) for path, layer in layers["unet"].items())


def test_what_is_written_has_its_strength_in_b_and_its_shape_in_the_header(tmp_path: Path) -> None:
    """Ranks 2, 2 and 3 of which the commonest is the default; strengths 5 / 2, 1 / 2 and 4 / 3."""
    ranks, alphas = {"a": 2, "b": 3, "c": 2}, {"a": 5.0, "b": 4.0, "c": 1.0}
    unet = {path: LoraLayer(torch.randn(rank, 6), torch.randn(4, rank), alphas[path]) for path, rank in ranks.items()}
    text = {
        "encoder.x": LoraLayer(torch.randn(2, 6), torch.randn(4, 2), 3.0, bias=torch.randn(4)),
        "text_model.encoder.y": LoraLayer(torch.randn(2, 6), torch.randn(4, 2), 2.0),
        "text_projection": LoraLayer(torch.randn(2, 6), torch.randn(4, 2), 2.0),
    }
    second = {"text_model.z": LoraLayer(torch.randn(2, 6), torch.randn(4, 2), 6.0, torch.rand(4))}
    layers = {"unet": unet, "text_encoder": text, "text_encoder_2": second}
    write_lora(tmp_path / "x.safetensors", layers, torch.float32, {"made": "here"})
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        header = file.metadata()
    written = load_file(tmp_path / "x.safetensors")
    keys = {f"unet.{path}": layer for path, layer in unet.items()}
    keys |= {
        "text_encoder.text_model.encoder.x": text["encoder.x"],
        "text_encoder.text_model.encoder.y": text["text_model.encoder.y"],
        "text_encoder.text_projection": text["text_projection"],
        "text_encoder_2.text_model.z": second["text_model.z"],
    }
    expected = {}
    for key, layer in keys.items():
        strength = layer.alpha / len(layer.down)
        expected |= {f"{key}.lora_A.weight": layer.down, f"{key}.lora_B.weight": strength * layer.up}
    expected["text_encoder.text_model.encoder.x.lora_B.bias"] = 1.5 * text["encoder.x"].bias
    expected["text_encoder_2.text_model.z.lora_magnitude_vector"] = second["text_model.z"].magnitude
    assert written.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(written[key], value, msg=key)
    assert (header["format"], header["made"]) == ("pt", "here")
    settings = json.loads(header["lora_adapter_metadata"])
    assert list(settings) == sorted(settings)

    def of(part: str) -> dict[str, Any]:
        return {key.removeprefix(f"{part}."): value for key, value in settings.items() if key.startswith(f"{part}.")}

    others = {"^b": 3}
    plain = {"r": 2, "lora_alpha": 2, "rank_pattern": {}, "alpha_pattern": {}}
    assert of("unet") == plain | {"rank_pattern": others, "alpha_pattern": others, "target_modules": ["a", "b", "c"]}
    assert of("text_encoder") == plain | {"target_modules": sorted(text), "lora_bias": True}
    assert of("text_encoder_2") == plain | {"target_modules": ["text_model.z"], "use_dora": True}


def test_a_file_has_the_asked_number_format_but_for_alphas() -> None:
    alpha, weight = torch.tensor(0.7), torch.rand(3, 2).T
    found = packed({"x.alpha": alpha, "x.lora_up.weight": weight}, torch.float16)
    assert torch.equal(found["x.alpha"], alpha) and found["x.alpha"].dtype == torch.float32
    assert torch.equal(found["x.lora_up.weight"], weight.half()) and found["x.lora_up.weight"].is_contiguous()


def test_a_dora_on_some_layers_alone_is_refused(sd: Any, tmp_path: Path) -> None:
    """Which layers say so does not matter; a plain LoRA on another part does not make it one."""
    unet, text = targets(sd.unet, "attn1.to_q"), targets(sd.text_encoder, "fc1")
    weights: dict[str, torch.Tensor] = {}
    for part, modules in (("unet", unet), ("text_encoder", text)):
        for path, module in modules.items():
            down, up = factors(module, 2, 0)
            weights |= {f"{part}.{path}.lora_A.weight": down, f"{part}.{path}.lora_B.weight": up}
    magnitudes = {f"unet.{path}.lora_magnitude_vector": torch.ones(len(it.weight)) for path, it in unet.items()}
    first, *_, last = magnitudes
    for some in ({first}, magnitudes.keys() - {first}, {last}):
        file = save(tmp_path, weights | {key: magnitudes[key] for key in some})
        with pytest.raises(ConfigError, match="is a DoRA on some layers of the unet and a LoRA on others"):
            deltas(sd, file)
    placed = place(read_lora(save(tmp_path, weights | magnitudes)), parts_of(sd))
    assert list(placed) == ["unet", "text_encoder"]
    has_magnitude = {part: {layer.magnitude is not None for layer in of.values()} for part, of in placed.items()}
    assert has_magnitude == {"unet": {True}, "text_encoder": {False}}


def test_a_one_by_one_convolution_is_a_linear_layer(sd: Any, tmp_path: Path) -> None:
    """SD 1.x has `proj_in` as a convolution, SDXL as a linear layer; files for either have both."""
    path, module = next(iter(targets(sd.unet, "proj_in").items()))
    down, up = factors(module, 2, 0)
    key = kohya("lora_unet_", path)
    flat = {f"{key}.lora_down.weight": down.flatten(1), f"{key}.lora_up.weight": up.flatten(1)}
    assert same(deltas(sd, save(tmp_path, flat)), {path: product(up, down, 1.0)})
    path, module = next(iter(targets(sd.unet, "attn1.to_q").items()))
    down, up = factors(module, 2, 0)
    key = kohya("lora_unet_", path)
    file = save(
        tmp_path, {f"{key}.lora_down.weight": down[..., None, None], f"{key}.lora_up.weight": up[..., None, None]}
    )
    assert same(deltas(sd, file), {path: product(up, down, 1.0)})


def test_layers_that_the_model_lacks_are_counted_and_one_is_named(sd: Any, tmp_path: Path) -> None:
    weights, _ = plain(sd.unet, ("attn1.to_q",))
    lacking = {f"lora_unet_nowhere_{n}.lora_{way}.weight": torch.ones(2, 2) for n in "ab" for way in ("down", "up")}
    file = save(tmp_path, weights | lacking)
    found = rf"2 of its {len(weights) // 2 + 2} layers find none in it, e.g. lora_unet_nowhere_a; "
    with pytest.raises(ConfigError, match=found):
        deltas(sd, file)


@pytest.mark.parametrize(
    ("width", "family"), [(16, "an unknown family"), (768, "Stable Diffusion 1.x"), (2048, "SDXL")]
)
def test_the_family_is_told_by_the_width_of_the_text(tmp_path: Path, width: int, family: str) -> None:
    path = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
    file = save(tmp_path, {f"{path}.lora_A.weight": torch.ones(2, width), f"{path}.lora_B.weight": torch.ones(8, 2)})
    assert recognise(file).family == family


# --- what is no LoRA that is read ---

_K = "lora_unet_mid_block_attentions_0_proj_in"
KINDS = {
    "a DoRA of kohya or LyCORIS": [f"{_K}.lora_down.weight", f"{_K}.lora_up.weight", f"{_K}.dora_scale"],
    "a LoHa": [f"{_K}.hada_w1_a", f"{_K}.hada_w1_b", f"{_K}.hada_w2_a", f"{_K}.hada_w2_b", f"{_K}.alpha"],
    "a LoKr": [f"{_K}.lokr_w1", f"{_K}.lokr_w2_a", f"{_K}.lokr_w2_b", f"{_K}.alpha"],
    "a GLoRA": [f"{_K}.a1.weight", f"{_K}.a2.weight", f"{_K}.b1.weight", f"{_K}.b2.weight"],
    "an OFT or BOFT": [f"{_K}.oft_blocks", f"{_K}.alpha"],
    "an (IA)": [f"{_K}.weight", f"{_K}.on_input"],
    "full differences of weights": [f"{_K}.diff", f"{_K}.diff_b"],
    "differences of norms (w_norm, b_norm) beside 1 plain layers": [
        f"{_K}.lora_down.weight",
        f"{_K}.lora_up.weight",
        "lora_unet_mid_block_resnets_0_norm1.w_norm",
    ],
    "a VeRA": ["base_model.model.mid_block.attentions.0.proj_in.vera_lambda_b"],
    "LoRA for FLUX": ["lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight"],
    "LoRA for FLUX, or": ["transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight"],
    "LoRA for FLUX, or a": ["double_blocks.0.processor.qkv_lora1.down.weight"],
    "LoRA for Stable Diffusion 3": ["lora_unet_joint_blocks_0_x_block_attn_qkv.lora_down.weight"],
    "LoRA for Qwen-Image": ["transformer.transformer_blocks.0.img_mlp.net.2.lora_A.weight"],
    "LoRA for Wan": ["diffusion_model.blocks.0.self_attn.q.lora_A.weight"],
    "LoRA for a transformer": ["transformer.transformer_blocks.0.attn.to_q.lora_A.weight"],
    "the weights of a whole UNet; give its folder": ["conv_in.weight", "conv_out.weight", "conv_norm_out.weight"],
    "a whole checkpoint": ["model.diffusion_model.input_blocks.0.0.weight"],
    "is a textual inversion; a LoRA or a whole UNet is needed": ["emb_params"],
    "is a textual inversion; a LoRA": ["clip_g", "clip_l"],
    "is a VAE alone": [
        "first_stage_model.decoder.up.0.block.0.conv1.weight",
        "first_stage_model.encoder.conv_in.bias",
    ],
    "is a VAE alone; a LoRA": ["decoder.up_blocks.0.resnets.0.conv1.weight"],
    "is no LoRA and no checkpoint: it holds mystery": ["mystery"],
    "has down for lora_unet_mid_block_attentions_0_proj_in, without the rest of it": [f"{_K}.lora_down.weight"],
    "has alpha, up for lora_unet_mid_block_attentions_0_proj_in, without": [f"{_K}.lora_up.weight", f"{_K}.alpha"],
    "holds embeddings and no layers of a LoRA": ["bundle_emb.x.string_to_param.*"],
    "holds no tensors": [],
    "holds mystery beside 1 layers of a LoRA": [f"{_K}.lora_down.weight", f"{_K}.lora_up.weight", "mystery"],
}


@pytest.mark.parametrize("says", KINDS)
def test_a_file_of_another_kind_is_named_and_refused(says: str, tmp_path: Path) -> None:
    file = save(tmp_path, {key: torch.ones(2, 2) for key in KINDS[says]})
    with pytest.raises(ConfigError) as caught:
        read_lora(file)
    text = str(caught.value)
    assert says in text and str(file) in text and "\n" not in text and len(text) < 320 + len(str(file))


def test_every_verb_says_the_same_before_a_model_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    file = save(tmp_path, {key: torch.ones(2, 2) for key in KINDS["a DoRA of kohya or LyCORIS"]})
    (tmp_path / "prompts.txt").write_text("a fox\n")
    Image.new("RGB", (64, 64), "red").save("a.png")
    Image.new("RGB", (64, 64), "blue").save("b.png")
    Path("metadata.jsonl").write_text('{"prompt": "red", "chosen": "a.png", "rejected": "b.png"}')
    monkeypatch.setattr("diffusers.DiffusionPipeline.from_pretrained", lambda *_, **__: pytest.fail("loaded"))
    said = set()
    for arguments in (
        ["train", f"model.adapter_path={file}", "data.type=folder", "data.path=."],
        ["train", "--dry-run", f"model.adapter_path={file}", "data.type=folder", "data.path=."],
        ["generate", f"model.adapter_path={file}", "model.pretrained=pocket", "prompts_path=prompts.txt"],
        ["export", "format=kohya", f"adapter_path={file}", "pretrained=pocket"],
        ["export", "format=merged", f"adapter_path={file}", "pretrained=pocket"],
        ["export", "--check", str(file), "pretrained=pocket"],
    ):
        assert main(arguments) == 2, arguments
        said.add(capsys.readouterr().err.strip().splitlines()[-1])
    assert len(said) == 1, said
    (sentence,) = said
    assert "dora_scale" in sentence and "merge it into its base with the program that made it" in sentence


@pytest.mark.parametrize(
    ("files", "says"),
    [
        (
            ["a.safetensors", "b.safetensors"],
            "holds 2 .safetensors files: a.safetensors, b.safetensors; name one of them",
        ),
        (["pytorch_lora_weights.bin"], "pytorch_lora_weights.bin is a pickle of torch.save"),
        (["model_index.json", "unet/config.json"], "is a whole pipeline, not an adapter"),
        ([], "holds neither pytorch_lora_weights.safetensors"),
    ],
)
def test_a_folder_without_one_adapter_is_named(files: list[str], says: str, tmp_path: Path) -> None:
    (tmp_path / "unet").mkdir()
    for name in files:
        (tmp_path / name).write_bytes(b"PK\x03\x04 and the rest of a zip")
    with pytest.raises(ConfigError, match=says.replace(".", r"\.")):
        find_adapter(tmp_path)


def test_the_one_file_of_a_folder_is_it(sd: Any, tmp_path: Path) -> None:
    weights, expected = plain(sd.unet, ("to_q",))
    file = save(tmp_path, weights, "my style.safetensors")
    assert find_adapter(tmp_path) == ("lora", file) and same(deltas(sd, file), expected)


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        ({"up": torch.ones(16, 2).index_fill(0, torch.tensor([3]), torch.inf)}, "NaN or infinite weights"),
        ({"alpha": torch.tensor(torch.nan)}, "NaN or infinite weights"),
        ({"down": torch.ones(2, 16, dtype=torch.int8)}, r"quantised weights \(torch.int8\)"),
        ({"up": torch.ones(16, 3)}, "has ranks of 2 and 3"),
        ({"down": torch.ones(3, 16), "mid": torch.ones(2, 2, 3, 3)}, "whose ranks differ"),
        ({"down": torch.ones(3, 16), "mid": torch.ones(3, 3, 3, 3)}, "whose ranks differ"),
        ({"up": torch.ones(17, 2)}, r"is \(17, 2\) x \(2, 16\), for a weight of \(16, 16\)"),
        ({"down": torch.ones(2, 16, 3, 3), "up": torch.ones(16, 2, 1, 1)}, "does not fit this model"),
        ({"alpha": torch.ones(2)}, "an alpha of more than one number"),
    ],
)
def test_a_broken_layer_is_named(sd: Any, tmp_path: Path, edit: dict[str, torch.Tensor], says: str) -> None:
    path = next(iter(targets(sd.unet, "attn1.to_q")))
    tensors = {"down": torch.ones(2, 16), "up": torch.ones(16, 2)} | edit
    ends = {"down": "lora_down.weight", "mid": "lora_mid.weight", "up": "lora_up.weight", "alpha": "alpha"}
    file = save(tmp_path, {f"{kohya('lora_unet_', path)}.{ends[key]}": value for key, value in tensors.items()})
    with pytest.raises(ConfigError, match=says):
        deltas(sd, file)


def test_a_peft_folder_of_another_kind_is_named(tmp_path: Path) -> None:
    save(
        tmp_path,
        {f"base_model.model.x.lora_{it}.weight": torch.ones(2, 2) for it in "AB"},
        "adapter_model.safetensors",
    )
    for settings, says in (
        ('{"peft_type": "LOHA"}', "holds a LOHA of peft"),
        ('{"alpha_pattern": {"x(": 2}}', "cannot read the LoRA"),
        ("{", "cannot be read"),
        ("3", "holds no"),
    ):
        (tmp_path / "adapter_config.json").write_text(settings)
        with pytest.raises(ConfigError, match=says):
            read_lora(tmp_path / "adapter_model.safetensors")
