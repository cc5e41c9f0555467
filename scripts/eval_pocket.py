"""Measure the shipped pocket models and draw the contact sheet of docs/pocket.md.

python scripts/eval_pocket.py                     # prints the figures, writes docs/pocket-samples.png
"""

import argparse
import time
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from diffusion_dpo.pocket.oracle import check
from diffusion_dpo.pocket.world import Scene, distinct_scenes, num_captions, render
from diffusion_dpo.sampling import DrawRequest, draw, image_seed, load_pipeline
from diffusion_dpo.scorers import ScoreRequest
from diffusion_dpo.scorers.clip import Clip
from diffusion_dpo.settings import ImageModel, Sampling


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--prompts", type=int, default=48, help="held-out prompts with one object, and as many with two"
    )
    parser.add_argument("--seeds", type=int, default=4, help="images a prompt")
    parser.add_argument("--renderings", type=int, default=2000)
    parser.add_argument("--sheet", type=Path, default=Path(__file__).parents[1] / "docs" / "pocket-samples.png")
    args = parser.parse_args()
    most = num_captions(num_items=1, held_out=True)
    if not 2 <= args.prompts <= most:
        parser.error(f"--prompts is {args.prompts}; it must be 2 to {most}, the held-out captions with one object")
    pipeline = load_pipeline(ImageModel(), device=torch.device("cpu"), dtype=torch.float32)
    scenes, images = rendered(args.renderings)
    print(f"oracle, clean renderings:    {np.mean([check(i, s)[1] for i, s in zip(images, scenes, strict=True)]):.4f}")
    decoded = reconstruct(pipeline, images)
    print(
        f"oracle, VAE reconstructions: {np.mean([check(i, s)[1] for i, s in zip(decoded, scenes, strict=True)]):.4f}"
    )
    print(f"CLIP picks the true caption out of 8 near ones: {clip_accuracy(images[:400], scenes[:400]):.3f}")
    for guidance in (1.0, 1.5, 3.0):
        for num_items in (1, 2):
            held_out = list(islice(distinct_scenes(1, num_items=num_items, held_out=True), args.prompts))
            began = time.perf_counter()
            drawn = draw_scenes(pipeline, held_out, guidance, args.seeds)
            seconds = (time.perf_counter() - began) * 64 / len(drawn)
            asked = [scene for scene in held_out for _ in range(args.seeds)]
            verdicts = np.array([check(i, s) for i, s in zip(drawn, asked, strict=True)])
            facts, right = verdicts.reshape(args.prompts, args.seeds, 2).mean(axis=1).T
            print(
                f"guidance {guidance}, {num_items} object(s): all facts right {mean_and_error(right)}, "
                f"facts right {mean_and_error(facts)}; "
                f"{seconds:.1f} s for 64 images on {torch.get_num_threads()} threads",
                flush=True,
            )
    sheet = [
        *islice(distinct_scenes(2, num_items=1, held_out=True), 8),
        *islice(distinct_scenes(2, num_items=2, held_out=True), 16),
    ]
    contact_sheet(draw_scenes(pipeline, sheet, 1.5), sheet).save(args.sheet)
    print(f"contact sheet: {args.sheet}")


def rendered(count: int) -> tuple[list[Scene], list[Image.Image]]:
    rng = np.random.default_rng(7)
    scenes = list(islice(distinct_scenes(7), count))
    return scenes, [render(scene, rng) for scene in scenes]


@torch.no_grad()
def reconstruct(pipeline, images: list[Image.Image]) -> list[Image.Image]:
    decoded = []
    for start in range(0, len(images), 50):
        pixels = pipeline.image_processor.preprocess(images[start : start + 50])
        latents = pipeline.vae.encode(pixels).latent_dist.mode()
        decoded += pipeline.image_processor.postprocess(pipeline.vae.decode(latents).sample, output_type="pil")
    return decoded


def draw_scenes(pipeline, scenes: list[Scene], guidance: float, seeds: int = 1) -> list[Image.Image]:
    """Draw `seeds` images of each scene, those of one scene one after the other."""
    sampling = Sampling(guidance_scale=guidance)
    requests = [DrawRequest(s.caption, image_seed(0, s.caption, k)) for s in scenes for k in range(seeds)]
    images = []
    for start in range(0, len(requests), sampling.batch_size):
        images += draw(pipeline, requests[start : start + sampling.batch_size], sampling)
    return images


def mean_and_error(by_prompt: np.ndarray) -> str:
    """Return mean +- standard error of one value a prompt; the seeds of a prompt are averaged before."""
    return f"{by_prompt.mean():.3f} +- {by_prompt.std(ddof=1) / len(by_prompt) ** 0.5:.3f}"


def clip_accuracy(images: list[Image.Image], scenes: list[Scene]) -> float:
    """Share of images whose own caption scores highest among 7 others, each with one word changed."""
    from pocket_parts import corrupt

    rng = np.random.default_rng(8)
    clip = Clip()
    clip.load(torch.device("cpu"))
    right = []
    for image, scene in zip(images, scenes, strict=True):
        captions = [scene.caption, *{corrupt(scene, rng).caption for _ in range(7)} - {scene.caption}]
        values = clip.score([ScoreRequest(image, caption) for caption in captions]).values["clip_text"]
        right.append(values.argmax() == 0)
    return float(np.mean(right))


def contact_sheet(images: list[Image.Image], scenes: list[Scene]) -> Image.Image:
    """Eight images a row at double size, the caption below, a green or red edge for right or wrong."""
    columns, cell, text_height = 8, 132, 46
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * (cell + 12) + 12, rows * (cell + text_height + 12) + 12), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(10)
    for number, (image, scene) in enumerate(zip(images, scenes, strict=True)):
        x = 12 + number % columns * (cell + 12)
        y = 12 + number // columns * (cell + text_height + 12)
        pen.rectangle(
            (x, y, x + cell - 1, y + cell - 1), fill=(60, 160, 80) if check(image, scene)[1] else (210, 60, 60)
        )
        sheet.paste(image.resize((cell - 4, cell - 4), Image.Resampling.NEAREST), (x + 2, y + 2))
        line, lines = "", []
        for word in scene.caption.split():
            if pen.textlength(f"{line} {word}", font=font) > cell:
                lines, line = [*lines, line], ""
            line = f"{line} {word}".strip()
        pen.multiline_text((x, y + cell + 3), "\n".join([*lines, line]), fill=(40, 40, 40), font=font, spacing=1)
    return sheet


if __name__ == "__main__":
    main()
