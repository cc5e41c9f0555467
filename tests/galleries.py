"""Image files as generators leave them: their texts in PNG chunks and EXIF, and graphs of ComfyUI."""

import io
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

SIZE_PX = (48, 40)


def png(texts: dict[str, str | tuple[str, bool]], image: Image.Image | None = None, *, packed: bool = False) -> bytes:
    """Return a PNG with texts, in chunks tEXt, or zTXt if `packed`; a tuple is a chunk iTXt, compressed or not."""
    info = PngInfo()
    for name, text in texts.items():
        if isinstance(text, tuple):
            info.add_itxt(name, text[0], zip=text[1])
        else:
            info.add_text(name, text, zip=packed)
    return _encoded(image, "PNG", pnginfo=info)


def with_exif(file_format: str, tags: dict[int, Any], image: Image.Image | None = None) -> bytes:
    """Return an image with tags of EXIF, those from 0x9000 in the directory that EXIF has of its own."""
    exif = Image.Exif()
    for tag, value in tags.items():
        (exif.get_ifd(0x8769) if tag >= 0x9000 else exif)[tag] = value
    return _encoded(image, file_format, exif=exif.tobytes())


def infotext(prompt: str, *, seed: int = 7, negative: str = "blurry", model: str = "dreamshaper_8") -> str:
    """Return what AUTOMATIC1111's web UI writes."""
    return (
        f"{prompt}\nNegative prompt: {negative}\nSteps: 20, Sampler: Euler a, Schedule type: Karras, CFG scale: 6.5, "
        f'Seed: {seed}, Size: 48x40, Model hash: 0a1b2c3d4e, Model: {model}, Lora hashes: "a: 1, Seed: 99", '
        "Version: f2.0.1v1.10.1"
    )


def node(kind: str, **inputs: Any) -> dict[str, Any]:
    """Return a node of ComfyUI; an input is a value, or a link: [node, output]."""
    return {"class_type": kind, "inputs": inputs}


def sampler(
    *, positive: str, negative: str = "7", latent: str = "5", model: str = "4", seed: int = 5
) -> dict[str, Any]:
    """Return a KSampler whose prompts come from these nodes."""
    links = {"positive": [positive, 0], "negative": [negative, 0], "latent_image": [latent, 0], "model": [model, 0]}
    return node("KSampler", seed=seed, steps=12, cfg=8.0, sampler_name="euler", scheduler="normal", **links)


def graph(prompt: Any = "a glass bottle", **nodes: dict[str, Any]) -> dict[str, Any]:
    """Return the graph of ComfyUI's first example, with the nodes that are given added or replaced."""
    return {
        "3": sampler(positive="6"),
        "4": node("CheckpointLoaderSimple", ckpt_name="v1-5.safetensors"),
        "5": node("EmptyLatentImage", width=48, height=40, batch_size=1),
        "6": node("CLIPTextEncode", text=prompt, clip=["4", 1]),
        "7": node("CLIPTextEncode", text="watermark", clip=["4", 1]),
        "8": node("VAEDecode", samples=["3", 0], vae=["4", 2]),
        "9": node("SaveImage", filename_prefix="ComfyUI", images=["8", 0]),
        **nodes,
    }


def _encoded(image: Image.Image | None, file_format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    (image or Image.new("RGB", SIZE_PX, "teal")).save(buffer, file_format, **options)
    return buffer.getvalue()
