"""Images that were judged one by one, liked or not: what Diffusion-KTO learns from, without pairs."""

from collections.abc import Iterator
from typing import ClassVar

from diffusion_dpo.data import Dropped, PreferencePair
from diffusion_dpo.data.records import RecordData
from diffusion_dpo.data.rows import make_labelled_image


class LabelledData(RecordData):
    """Single images with `prompt`, `image` and `label` (true: liked): Parquet, or rows that name image files."""

    noun: ClassVar[str] = "labelled images"
    keys = ("prompt", "image", "label")
    image_keys = ("image",)
    example = '{"prompt": "a cat", "image": "cat_1.png", "label": true}'
    numbers = ("label",)

    def read(self) -> Iterator[PreferencePair | Dropped]:
        """Yield every row; the side that is not there is empty."""
        for record in self.records():
            images = self.images(record, ("image",)) if not record.fault else Dropped(record.where, record.fault)
            if isinstance(images, Dropped):
                yield images
                continue
            prompt, label = record.values["prompt"], record.values["label"]
            yield make_labelled_image(record.where, prompt, images[0], label, source="labelled")
