#!/usr/bin/env bash
# datasets 5.2.0: the WebDataset loader takes the columns, and the types inside the JSON, from the first five samples of
# the first tar. What comes later and is different is lost without a word, or stops everything:
#   a. from the sixth sample on the image is a PNG instead of a JPEG: the sample is there, and its image is None;
#   b. from the sixth sample on the JSON has one more key: the key is gone;
#   c. a value in the JSON is null in the first five samples and a number later: the whole data set is refused.
#
# Expected: the images of all samples, or one message that names the sample that differs.
# Observed: as above. Output:
#   5.2.0 a: 6 samples with ['jpg', 'json', '__key__', '__url__'] the sixth: None
#   5.2.0 b: the sixth: {'prompt': 'x', 'score': None}
#   5.2.0 c: Couldn't cast array of type double to null
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check datasets==5.2.0 pillow==12.3.0
cd "$work"
HF_HUB_OFFLINE=1 HF_DATASETS_DISABLE_PROGRESS_BARS=1 "$work/venv/bin/python" - <<'PYTHON'
import io
import json
import tarfile

import datasets
from PIL import Image


def load(name, suffix, facts):
    """A tar of five samples with a JPEG and {"prompt", "score": null}, and a sixth one that may differ."""
    samples = [("jpg", {"prompt": "x", "score": None})] * 5 + [(suffix, facts)]
    with tarfile.open(f"{name}.tar", "w") as tar:
        for index, (kind, values) in enumerate(samples):
            buffer = io.BytesIO()
            Image.new("RGB", (32, 32), (index * 40, 0, 0)).save(buffer, "PNG" if kind == "png" else "JPEG")
            for end, data in ((kind, buffer.getvalue()), ("json", json.dumps(values).encode())):
                member = tarfile.TarInfo(f"{index:04d}.{end}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return datasets.load_dataset("webdataset", data_files=f"{name}.tar", split="train", cache_dir=f"cache-{name}")


late_png = load("a", "png", {"prompt": "x", "score": None})
print(datasets.__version__, "a:", len(late_png), "samples with", late_png.column_names, "the sixth:", late_png[5]["jpg"])
late_key = load("b", "jpg", {"prompt": "x", "score": None, "model": "m"})
print(datasets.__version__, "b: the sixth:", late_key[5]["json"])
try:
    load("c", "jpg", {"prompt": "x", "score": 0.5})
    refused = "not refused"
except datasets.exceptions.DatasetGenerationError as error:
    refused = str(error.__cause__)
print(datasets.__version__, "c:", refused)
assert len(late_png) == 6 and late_png[5]["jpg"] is None and "png" not in late_png.column_names
assert late_key[5]["json"] == {"prompt": "x", "score": None}
assert refused == "Couldn't cast array of type double to null"
PYTHON
