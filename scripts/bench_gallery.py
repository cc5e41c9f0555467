"""What it costs to make a gallery of generated images candidates, beside a plain loop that opens every file.

    python scripts/bench_gallery.py                     # 10,000 PNG files, half of A1111, half of ComfyUI
    python scripts/bench_gallery.py --images 1000 --rounds 3

Goal: at most 1.3 times the processor time of the loop, within 200 MB more memory. The loop opens each file with Pillow
and reads its text chunks, no more: `Image.open(file).info`. The candidates are read as every verb begins with them:
listed, prompts found, grouped by prompt, no pixel decoded. Both run in processes of their own, in turn.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

IMAGES_PER_PROMPT = 8
SIDE_PX = 256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--one", nargs=2, metavar=("WAY", "FOLDER"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        measure(args.one[0], Path(args.one[1]))
        return
    found: dict[str, list[dict[str, float]]] = {"loop": [], "candidates": []}
    with tempfile.TemporaryDirectory() as folder:
        make_gallery(Path(folder), args.images)
        for _ in range(args.rounds):
            for way in found:
                command = [sys.executable, __file__, "--one", way, folder]
                found[way].append(
                    json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
                )
    seconds = {way: statistics.median(it["seconds"] for it in runs) for way, runs in found.items()}
    megabytes = {way: statistics.median(it["megabytes"] for it in runs) for way, runs in found.items()}
    for way, runs in found.items():
        spread = ", ".join(f"{it['seconds']:.3f}" for it in runs)
        print(f"{way}: {seconds[way]:.3f} s of processor time (each {spread}), {megabytes[way]:.0f} MB at its peak")
    print(f"candidates over loop: {seconds['candidates'] / seconds['loop']:.2f} x the time", end=", ")
    print(f"{megabytes['candidates'] - megabytes['loop']:+.0f} MB")


def measure(way: str, folder: Path) -> None:
    """Go through a gallery once, and print the processor time after the imports, and the peak of memory."""
    from diffusion_dpo.data.candidates import find_units

    Image.preinit()
    began = time.process_time()
    if way == "loop":
        kept = []
        for file in sorted(folder.iterdir()):
            with Image.open(file) as image:
                kept.append(dict(image.info))
    else:
        groups: dict[str, list[object]] = {}
        for unit in find_units(folder):
            for candidate in unit.read(images=False):
                groups.setdefault(candidate.group, []).append(candidate)
        assert "" not in groups, "every image has a prompt inside"
    seconds = time.process_time() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << (20 if sys.platform == "darwin" else 10))
    print(json.dumps({"seconds": seconds, "megabytes": peak}))


def make_gallery(folder: Path, num_images: int) -> None:
    """Write images as A1111 and ComfyUI do, in turn, eight to a prompt."""
    rng = np.random.default_rng(0)
    pictures = [Image.fromarray(rng.integers(0, 256, (SIDE_PX, SIDE_PX, 3), dtype=np.uint8)) for _ in range(4)]
    for number in range(num_images):
        prompt = f"a lighthouse on rock {number // IMAGES_PER_PROMPT}, oil painting, storm at sea, highly detailed"
        info = PngInfo()
        if number % 2:
            info.add_text("parameters", _infotext(prompt, number))
        else:
            graph = _graph(prompt, number)
            info.add_text("prompt", json.dumps(graph))
            info.add_text("workflow", json.dumps(_workflow(graph)))
        pictures[number % len(pictures)].save(folder / f"{number:06d}.png", pnginfo=info, compress_level=0)


def _infotext(prompt: str, seed: int) -> str:
    return (
        f"{prompt}\nNegative prompt: blurry, watermark, low quality\nSteps: 20, Sampler: DPM++ 2M, "
        f"Schedule type: Karras, CFG scale: 7, Seed: {seed}, Size: 512x512, Model: dreamshaper_8, Version: v1.10.1"
    )


def _graph(prompt: str, seed: int) -> dict[str, dict[str, object]]:
    sampling = {"steps": 20, "cfg": 8.0, "sampler_name": "euler", "scheduler": "normal", "denoise": 1.0}
    links = {"model": ["4", 0], "positive": ["6", 0], "negative": ["7", 0], "latent_image": ["5", 0]}
    nodes: dict[str, tuple[str, dict[str, object]]] = {
        "3": ("KSampler", {"seed": seed, **sampling, **links}),
        "4": ("CheckpointLoaderSimple", {"ckpt_name": "v1-5-pruned-emaonly.safetensors"}),
        "5": ("EmptyLatentImage", {"width": 512, "height": 512, "batch_size": 1}),
        "6": ("CLIPTextEncode", {"text": prompt, "clip": ["4", 1]}),
        "7": ("CLIPTextEncode", {"text": "text, watermark", "clip": ["4", 1]}),
        "8": ("VAEDecode", {"samples": ["3", 0], "vae": ["4", 2]}),
        "9": ("SaveImage", {"filename_prefix": "ComfyUI", "images": ["8", 0]}),
    }
    return {name: {"inputs": inputs, "class_type": kind} for name, (kind, inputs) in nodes.items()}


def _workflow(graph: dict[str, dict[str, object]]) -> dict[str, object]:
    """Return the graph as the editor keeps it, some kilobytes, which is stored beside what was run."""
    nodes = [
        {"id": int(name), "type": node["class_type"], "pos": [863, 186], "size": [315, 262], "flags": {}, "order": 4}
        | {
            "mode": 0,
            "inputs": [{"name": "model", "type": "MODEL", "link": 1}] * 4,
            "properties": {},
            "widgets_values": [],
        }
        for name, node in graph.items()
    ]
    return {"last_node_id": 9, "last_link_id": 9, "nodes": nodes, "links": [], "groups": [], "version": 0.4}


if __name__ == "__main__":
    main()
