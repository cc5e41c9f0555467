"""`export --check`: what a file is, whether it fits, and what is wrong with it."""

import json
import re
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file

from diffusion_dpo.cli import main
from diffusion_dpo.models.safetensors_file import read_facts
from tests.exporting.loras import Made, run


def check(file: Path, capsys: pytest.CaptureFixture[str], *settings: str) -> tuple[int, str]:
    code = main(["export", "--check", str(file), *settings])
    captured = capsys.readouterr()
    return code, captured.out + captured.err


def test_check_says_what_a_file_is_and_what_it_changes(
    made: Callable[[str, str], Made], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = made("sd", "all")
    kohya = run(model, tmp_path / "k", "format=kohya") / "sd-all.safetensors"
    single = run(model, tmp_path / "s", "format=single_file") / "sd-all.safetensors"
    capsys.readouterr()
    for file, words in (
        (kohya, ("a LoRA in kohya naming", "every layer finds its place", "ss_base_model_version: sd_v1")),
        (
            model.folder,
            ("a LoRA in diffusers naming", "of the text encoder", "alpha 16 mostly (2 to 16)", "ComfyUI may not know"),
        ),
        (single, ("a single-file checkpoint", "modelspec.architecture: stable-diffusion-v1")),
    ):
        code, text = check(file, capsys, f"pretrained={model.base}")
        assert code == 0 and "it does something" in text and "unet: changes by" in text, text
        assert all(word in text for word in words), text
    code, text = check(kohya, capsys)
    assert code == 0 and "give pretrained=" in text
    code, text = check(kohya, capsys, f"pretrained={made('xl', 'plain').base}")
    assert code == 2 and "does not fit this model" in text


def test_check_sees_what_is_wrong_with_an_alpha(
    made: Callable[[str, str], Made], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = made("sd", "plain")
    file = run(model, tmp_path / "k", "format=kohya") / "sd-plain.safetensors"
    weights, first = load_file(file), next(key for key in load_file(file) if key.endswith(".alpha"))
    capsys.readouterr()
    save_file(weights, tmp_path / "header.safetensors", metadata={"ss_network_alpha": "4"})
    assert (
        "the header says alpha 4, the weights 16"
        in check(tmp_path / "header.safetensors", capsys, f"pretrained={model.base}")[1]
    )
    for nothing in ("None", "Dynamic"):
        save_file(weights, tmp_path / "silent.safetensors", metadata={"ss_network_alpha": nothing})
        code, text = check(tmp_path / "silent.safetensors", capsys, f"pretrained={model.base}")
        assert code == 0 and "the header says" not in text
    save_file(weights | {first: torch.tensor(2.0)}, tmp_path / "mixed.safetensors")
    code, text = check(tmp_path / "mixed.safetensors", capsys, f"pretrained={model.base}")
    assert code == 0 and "alpha 16 mostly (2 to 16)" in text
    assert re.search(
        r"diffusers computes something else with .*: the unet is off by .* of what the LoRA changes", text
    )
    some = {key: value for key, value in weights.items() if key != first}
    save_file(some, tmp_path / "some.safetensors")
    text = check(tmp_path / "some.safetensors", capsys, f"pretrained={model.base}")[1]
    assert re.search("1 of [0-9]+ layers have no alpha", text) and "diffusers computes something else" in text
    plain = {key: value for key, value in weights.items() if not key.endswith(".alpha")}
    save_file(plain, tmp_path / "none.safetensors")
    assert "does not say its alpha" in check(tmp_path / "none.safetensors", capsys, f"pretrained={model.base}")[1]
    broken = weights | {first.replace(".alpha", ".lora_up.weight"): torch.full((16, 4), torch.nan)}
    save_file(broken, tmp_path / "nan.safetensors")
    code, text = check(tmp_path / "nan.safetensors", capsys, f"pretrained={model.base}")
    assert code == 2 and "NaN" in text


def _safetensors(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


ENTRY = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "is empty"),
        (b"abc", "is cut off"),
        (b"<!DOCTYPE html><html>", "is a web page"),
        (b"\n <HTML><body>404", "is a web page"),
        (b"PK\x03\x04rest of a zip", "is a pickle of torch.save"),
        (b"\x80\x02}q\x00.aaaa", "is a pickle of torch.save"),
        (b"version https://git-lfs.github.com/spec/v1", "is a git-lfs pointer"),
        (b"\xff" * 64, "is cut off or no safetensors file"),
        (_safetensors({"x": ENTRY}, b"12"), "is cut off"),
        (_safetensors({"x": ENTRY}, b"12345678"), "is longer than it should be"),
        (_safetensors(b"[1, 2]"), "its header cannot be read"),
        (_safetensors(b"[" * 100_000), "its header cannot be read"),
        (_safetensors({"x": 3}), "its header cannot be read"),
        (_safetensors({}), "holds no tensors"),
        (_safetensors({"a\x1b[31m": ENTRY}, b"1234"), "is no LoRA and no checkpoint: it holds a [31m"),
        (
            _safetensors({"base_model.model.x.lora_A.weight": ENTRY}, b"1234"),
            "has down for base_model.model.x, without",
        ),
    ],
)
def test_check_answers_a_broken_file_in_a_sentence(
    content: bytes, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "x.safetensors"
    file.write_bytes(content)
    code, text = check(file, capsys, "pretrained=pocket")
    assert code == 2 and says in text and "Traceback" not in text and "\x1b" not in text
    assert main(["export", "--check", str(tmp_path / "nothing")]) == 2


@pytest.mark.parametrize("length", [640, 896, 1152, 1408])
def test_a_length_that_begins_as_a_pickle_does_is_no_pickle(length: int, tmp_path: Path) -> None:
    """The first bytes of a file are the length of its header: one of 0x0280 begins with the bytes 80 02."""
    text = json.dumps({"x": ENTRY}).encode().ljust(length)
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", length) + text + b"1234")
    assert read_facts(tmp_path / "x.safetensors").shapes == {"x": (1,)}


def test_check_names_another_family(
    bases: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, text = check(bases["sd"], capsys, f"pretrained={bases['xl']}")
    assert code == 2 and "they are of different families" in text
    pipeline = StableDiffusionPipeline.from_pretrained(bases["sd"])
    pipeline.unet.conv_out.weight.data.fill_(torch.nan)
    pipeline.unet.save_pretrained(tmp_path / "unet")
    code, text = check(tmp_path / "unet", capsys, f"pretrained={bases['sd']}")
    assert code == 2 and "the unet computes NaN" in text
