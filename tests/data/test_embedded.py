"""What generators leave inside images: the prompt and the settings, of every program and in every container."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from diffusion_dpo.data.embedded import Embedded, read_caption, read_embedded
from tests.galleries import graph, infotext, node, png, sampler, with_exif

PROMPT = 'a lighthouse, "oil", café (storm:1.2)\nSteps into the sea: 3'
UTF8 = PROMPT.replace("é", "\u2026\u706f")
INFO = infotext(UTF8)
COMMENT = 0x9286
CONTAINERS = {
    "tEXt": png({"parameters": infotext(PROMPT)}),
    "zTXt": png({"parameters": infotext(PROMPT)}, packed=True),
    "iTXt": png({"parameters": (INFO, False)}),
    "zipped iTXt": png({"parameters": (INFO, True)}),
    "big endian": with_exif("JPEG", {COMMENT: b"UNICODE\0" + INFO.encode("utf-16-be")}),
    "little endian": with_exif("JPEG", {COMMENT: b"UNICODE\0" + INFO.encode("utf-16-le")}),
    "ASCII": with_exif("JPEG", {COMMENT: b"ASCII\0\0\0" + INFO.encode()}),
    "no prefix": with_exif("WEBP", {COMMENT: INFO.encode()}),
    "WebP": with_exif("WEBP", {COMMENT: b"UNICODE\0" + INFO.encode("utf-16-be")}),
    "description": with_exif("JPEG", {0x010E: infotext("a plain lighthouse")}),
}


@pytest.mark.parametrize("name", CONTAINERS)
def test_infotext_is_read_from_every_container(name: str):
    found = read_embedded(CONTAINERS[name])
    assert found.prompt == {"tEXt": PROMPT, "zTXt": PROMPT, "description": "a plain lighthouse"}.get(name, UTF8)
    made = found.tell()
    assert made.seed == 7
    assert made.origin == {
        "model": "dreamshaper_8",
        "sampler": "Euler a",
        "schedule": "Karras",
        "num_inference_steps": 20,
        "guidance_scale": 6.5,
        "negative_prompt": "blurry",
    }


@pytest.mark.parametrize(
    ("text", "prompt", "negative"),
    [
        ("a\n\nb\nNegative prompt: c\nd\nSteps: 1, Sampler: x, Seed: 2, Size: 8x8", "a\n\nb", "c\nd"),
        ("a\nSteps: 1, Sampler: x, CFG scale: 1, Seed: 2\nTemplate: {a|b}", "a", None),
        ("a\r\nNegative prompt: \r\nSteps: 1, Sampler: x, CFG scale: 1, Seed: 2", "a", None),
    ],
)
def test_infotext_has_many_shapes(text: str, prompt: str, negative: str | None):
    found = read_caption(text)
    assert (found.prompt, found.tell().origin.get("negative_prompt")) == (prompt, negative)
    assert found.tell().seed == 2


def test_a_caption_is_no_infotext_because_of_a_word():
    assert read_caption("a\nSteps: of stone, wet") == Embedded("a\nSteps: of stone, wet")


def noise(side_px: int) -> Image.Image:
    """Return an image that does not compress."""
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (side_px, side_px, 3), dtype=np.uint8))


SDXL = node("CLIPTextEncodeSDXL", text_g="a glass bottle", text_l=" a glass bottle", width=8, clip=["4", 1])
GRAPHS: dict[str, dict[str, Any]] = {
    "plain": graph(),
    "no number": graph()
    | {"4": node("CheckpointLoaderSimple", ckpt_name="v1-5.safetensors") | {"is_changed": [float("nan")]}},
    "SDXL": graph(**{"6": SDXL}),
    "linked text": graph(["20", 0], **{"20": node("PrimitiveStringMultiline", value="a glass bottle")}),
    "joined text": graph(
        ["20", 0], **{"20": node("StringConcatenate", string_a="a glass", string_b=["21", 0], delimiter=" ")}
    )
    | {"21": node("PrimitiveString", value="bottle")},
    "through conditioning": graph()
    | {
        "3": sampler(positive="31", negative="7"),
        "30": node("ConditioningSetTimestepRange", conditioning=["6", 0], start=0.0, end=1.0),
        "31": node("ControlNetApplyAdvanced", positive=["30", 0], negative=["7", 0], strength=1.0),
    },
    "Flux": graph()
    | {
        "3": node("SamplerCustomAdvanced", noise=["40", 0], guider=["41", 0], sampler=["42", 0], sigmas=["43", 0]),
        "40": node("RandomNoise", noise_seed=5),
        "41": node("BasicGuider", model=["4", 0], conditioning=["44", 0]),
        "42": node("KSamplerSelect", sampler_name="euler"),
        "43": node("BasicScheduler", scheduler="normal", steps=12, denoise=1.0, model=["4", 0]),
        "44": node("FluxGuidance", guidance=3.5, conditioning=["6", 0]),
    },
    "refiner": graph()
    | {
        "50": sampler(positive="51", latent="3", seed=6),
        "51": node("CLIPTextEncode", text="fine details", clip=["4", 1]),
        "8": node("VAEDecode", samples=["50", 0], vae=["4", 2]),
    },
    "unused branch": graph()
    | {"60": sampler(positive="61", seed=6), "61": node("CLIPTextEncode", text="a dog", clip=["4", 1])},
    "loader with texts": graph()
    | {
        "3": node("KSampler (Efficient)", positive=["70", 1], negative=["70", 2], seed=5, steps=12, cfg=8.0),
        "70": node("Efficient Loader", positive="a glass bottle", negative="watermark", ckpt_name="v1-5.safetensors"),
    },
    "switch": graph(["80", 0], **{"80": node("Any Switch (rgthree)", any_02=["81", 0])})
    | {"81": node("String Literal", string="a glass bottle")},
}


@pytest.mark.parametrize("name", GRAPHS)
def test_the_prompt_of_a_graph_is_what_its_image_began_with(name: str):
    found = read_embedded(png({"prompt": json.dumps(GRAPHS[name]), "workflow": json.dumps({"nodes": []})}))
    assert (found.prompt, found.fault) == ("a glass bottle", "")
    made = found.tell()
    assert made.seed == 5
    if name == "plain":
        assert made.origin == {
            "model": "v1-5.safetensors",
            "sampler": "euler",
            "schedule": "normal",
            "num_inference_steps": 12,
            "guidance_scale": 8.0,
            "negative_prompt": "watermark",
        }
    if name == "Flux":
        assert (made.origin["model"], made.origin["num_inference_steps"]) == ("v1-5.safetensors", 12)


@pytest.mark.parametrize(
    ("nodes", "message"),
    [
        (graph(["20", 0], **{"20": node("OllamaGenerate", text="bottle")}), "from the ComfyUI node OllamaGenerate"),
        (graph(**{"6": node("CLIPTextEncodeFlux", clip_l="a", t5xxl="b", clip=["4", 1])}), "a prompt of its own"),
        (
            graph(**{"90": node("ConditioningCombine", conditioning_1=["6", 0], conditioning_2=["7", 0])})
            | {"3": sampler(positive="90")},
            "ConditioningCombine mixes 2 prompts",
        ),
        (graph(**{"60": sampler(positive="7"), "61": node("SaveImage", images=["60", 0])}), "draws with 2 prompts"),
        (graph(**{"6": node("ControlNetApply", conditioning=["6", 0])}), "in a circle"),
        (graph(**{"3": node("MysterySampler", seed=1)}), "no sampler that is known here"),
        ({"a": 1}, "no sampler"),
    ],
)
def test_a_graph_that_does_not_say_the_prompt_is_named_and_nothing_is_guessed(nodes: dict[str, Any], message: str):
    found = read_embedded(png({"prompt": json.dumps(nodes)}))
    assert found.prompt == ""
    assert message in found.fault


def test_the_seed_of_an_image_is_its_own(tmp_path: Path):
    """Graphs that differ in the seed alone are followed once; nothing else of them may be shared."""
    for seed in (5, 6):
        (tmp_path / f"{seed}.png").write_bytes(
            png({"prompt": json.dumps(graph("a fox", **{"3": sampler(positive="6", seed=seed)}))})
        )
    assert [read_embedded(str(tmp_path / f"{seed}.png")).tell().seed for seed in (5, 6)] == [5, 6]
    other = graph("a dog", **{"3": sampler(positive="6", seed=5)})
    assert read_embedded(png({"prompt": json.dumps(other)})).prompt == "a dog"


@pytest.mark.parametrize("size", [10, 40_000])
def test_what_is_behind_a_large_text_or_the_pixels_is_found(tmp_path: Path, size: int):
    file = tmp_path / "a.png"
    file.write_bytes(png({"workflow": "x" * size, "parameters": infotext("a fox")}, noise(160)))
    assert read_embedded(str(file)).prompt == "a fox"
    data = png({"parameters": infotext("a fox")}, noise(160))
    start, end = data.index(b"tEXt") - 4, data.index(b"IDAT") - 4
    moved = data[:start] + data[end:-12] + data[start:end] + data[-12:]
    assert Image.open(io.BytesIO(moved)).info == {}, "which Pillow reads once it has decoded the pixels"
    file.write_bytes(moved)
    assert read_embedded(str(file)).prompt == read_embedded(moved).prompt == "a fox"


def test_the_prompt_is_read_without_the_pixels():
    data = png({"parameters": infotext("a fox")}, noise(160))
    cut = data[: data.index(b"IDAT") + 40]
    with pytest.raises(OSError, match="truncated"):
        _ = Image.open(io.BytesIO(cut)).text
    assert read_embedded(cut).prompt == "a fox"


def test_a_node_that_passes_both_prompts_on_says_which_is_which():
    both = node("ControlNetApplyAdvanced", positive=["6", 0], negative=["7", 0])
    swapped = sampler(positive="31", negative="31")
    swapped["inputs"]["positive"][1] = 1
    found = read_embedded(png({"prompt": json.dumps(graph(**{"3": swapped, "31": both}))}))
    assert (found.prompt, found.tell().origin["negative_prompt"]) == ("watermark", "a glass bottle")


SETTINGS = {"negative_prompt": "fog", "steps": 25, "seed": 777}
OTHERS = {
    "ComfyUI in WebP": with_exif("WEBP", {0x0110: f"prompt:{json.dumps(graph('a fox'))}", 0x010F: "workflow:{}"}),
    "ComfyUI in JPEG": with_exif("JPEG", {0x010E: "Workflow:{}", 0x010F: f"Prompt: {json.dumps(graph('a fox'))}"}),
    "SwarmUI": png({"parameters": json.dumps({"sui_image_params": {"prompt": "a fox", "seed": 777}})}),
    "SwarmUI in JPEG": with_exif(
        "JPEG",
        {COMMENT: b"UNICODE\0" + json.dumps({"sui_image_params": {"prompt": "a fox"}}).encode("utf-16-le")},
    ),
    "Fooocus": png(
        {"fooocus_scheme": "fooocus", "parameters": json.dumps({"prompt": "a fox", "base_model": "jug", **SETTINGS})}
    ),
    "InvokeAI": png(
        {"invokeai_metadata": json.dumps({"positive_prompt": "a fox", "model": {"name": "x"}, **SETTINGS})}
    ),
    "InvokeAI 2": png({"sd-metadata": json.dumps({"image": {"prompt": [{"prompt": "a fox", "weight": 1}]}})}),
    "NovelAI": png({"Software": "NovelAI", "Description": "a fox", "Comment": json.dumps({"uc": "fog", "seed": 777})}),
    "Easy Diffusion": png({"prompt": "a fox", "seed": "777", "use_stable_diffusion_model": "x", "width": "48"}),
    "Midjourney": png({"Description": f"a fox --ar 3:2 --v 6 Job ID: {'0' * 8}-0000-0000-0000-{'0' * 12}"}),
    "two at once": png({"parameters": infotext("a fox"), "prompt": json.dumps({"a": 1})}),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_programs_are_read(name: str):
    found = read_embedded(OTHERS[name])
    assert (found.prompt, found.fault) == ("a fox", "")
    found.tell()


def test_the_settings_of_other_programs_have_the_names_of_an_origin():
    made = read_embedded(OTHERS["InvokeAI"]).tell()
    assert made.origin == {"model": "x", "num_inference_steps": 25, "negative_prompt": "fog"}
    assert made.seed == 777
    assert read_embedded(OTHERS["Easy Diffusion"]).tell().origin == {"model": "x"}


@pytest.mark.parametrize(
    ("data", "fault"),
    [
        (png({}), ""),
        (png({"Software": "GIMP", "Comment": "made by hand", "Description": "a fox"}), ""),
        (with_exif("JPEG", {0x010F: "Canon", 0x0110: "EOS", COMMENT: b"ASCII\0\0\0a holiday"}), ""),
        (png({"parameters": "something else"}), "of no program that is known"),
        (png({"workflow": "{}"}), "a workflow of ComfyUI without the prompt"),
        (png({"parameters": infotext("")}), "an empty prompt"),
        (b"no image", ""),
        (png({"parameters": infotext("a fox")})[:60], ""),
        (with_exif("JPEG", {COMMENT: infotext("a fox").encode()})[:40], ""),
        (b"RIFF\0\0\0\0WEBPEXIF\xff\xff\xff\x7fII*\0\xff\xff\xff\xff", ""),
    ],
)
def test_what_no_generator_wrote_is_no_prompt_and_damage_is_no_error(data: bytes, fault: str):
    found = read_embedded(data)
    assert found.prompt == ""
    assert fault in found.fault
    assert bool(fault) == bool(found.fault)
