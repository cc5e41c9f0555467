#!/usr/bin/env bash
# datasets 5.2.0: load_dataset(folder) of a WebDataset tar beside one JSON file (img2dataset, for one, writes such a file
# of statistics beside every tar) returns the JSON file as a data set of one row. The tar, with all the images, is passed
# over without a warning: the kind of the folder is that of its commonest suffix, and of two that are equally common the
# JSON file's wins.
#
# Expected: the three samples of the tar, or an error that names both kinds.
# Observed: {'count': 3} as the only row. With a second tar the samples are found. Output:
#   5.2.0 one tar and one JSON file: 1 row, {'count': 3}
#   5.2.0 two tars and one JSON file: 6 rows with ['__key__', '__url__', 'jpg', 'txt']
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
from pathlib import Path

import datasets
from PIL import Image


def write_tar(path):
    with tarfile.open(path, "w") as tar:
        for index in range(3):
            buffer = io.BytesIO()
            Image.new("RGB", (32, 32), (index * 80, 0, 0)).save(buffer, "JPEG")
            for name, data in ((f"{index:09d}.jpg", buffer.getvalue()), (f"{index:09d}.txt", b"a caption")):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


folder = Path("images")
folder.mkdir()
write_tar(folder / "00000.tar")
Path(folder / "00000_stats.json").write_text(json.dumps({"count": 3}))
one = datasets.load_dataset(str(folder), split="train", cache_dir="cache-one")
print(datasets.__version__, "one tar and one JSON file:", len(one), "row,", one[0])
write_tar(folder / "00001.tar")
two = datasets.load_dataset(str(folder), split="train", cache_dir="cache-two")
print(datasets.__version__, "two tars and one JSON file:", len(two), "rows with", sorted(two.features))
assert one[:] == {"count": [3]}, "the tar is no longer passed over"
assert len(two) == 6 and "jpg" in two.features
PYTHON
