"""Images drawn while training: fixed prompts and seeds, so that two steps differ by the training alone."""

from collections.abc import Sequence

from PIL.PngImagePlugin import PngInfo

from diffusion_dpo.files import atomic_path
from diffusion_dpo.sampling import DrawRequest, draw, image_seed
from diffusion_dpo.training import Run


def preview_if_due(run: Run, training_prompts: Sequence[str], step: int, *, is_last: bool) -> None:
    """Draw what is missing of `previews/step-XXXXXXXX/`: at the start, at the end, and every so many steps.

    All processes draw, since each may hold a part of the model; the main one writes.
    """
    config = run.config
    if config.preview is None:
        return
    every = config.preview.every_steps
    if not (step == 0 or is_last or (every and step % every == 0)):
        return
    prompts = config.preview.prompts or tuple(dict.fromkeys(training_prompts))[:4]
    folder = config.output_dir / "previews" / f"step-{step:08d}"
    folder.mkdir(parents=True, exist_ok=True)
    requests = [DrawRequest(text, image_seed(config.seed, text, 0)) for text in prompts]
    if run.processes.from_main(all((folder / f"{number:02d}.png").exists() for number in range(len(requests)))):
        return
    sampling = config.preview.sampling
    if sampling.resolution_px is None:
        sampling = sampling.model_copy(update={"resolution_px": config.resolution_px})
    for start in range(0, len(requests), sampling.batch_size):
        with run.as_result():
            images = draw(run.model.pipeline, requests[start : start + sampling.batch_size], sampling)
        if not run.processes.is_main:
            continue
        for number, image in enumerate(images, start=start):
            with atomic_path(folder / f"{number:02d}.png") as partial:
                image.save(partial, format="PNG", pnginfo=_says(requests[number].prompt))


def _says(prompt: str) -> PngInfo:
    """Return the prompt as text of a PNG file, so that whoever finds it knows what it shows; `report` reads it."""
    info = PngInfo()
    info.add_itxt("prompt", prompt.encode("utf-8", "replace").decode("utf-8"))
    return info
