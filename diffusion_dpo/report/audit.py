"""A blind sheet for a person to check labels by eye: audit.html to look at, audit.jsonl with the key.

Which pairs are drawn, their order, and which image is on the left follow from a hash of pair and seed alone: neither
place nor order tells anything of the label, and the same pairs give the same sheet.
"""

import hashlib
import heapq
import json
from collections.abc import Iterable
from pathlib import Path

from diffusion_dpo.data import PreferencePair
from diffusion_dpo.data.images import decode_rgb
from diffusion_dpo.files import atomic_path
from diffusion_dpo.report.data_page import kept
from diffusion_dpo.report.gallery import SMALL_PX, thumbnails
from diffusion_dpo.report.page import asset, fill
from diffusion_dpo.report.words import count, shorten

PAGE, KEY = "audit.html", "audit.jsonl"
_PROMPT_CHARACTERS = 1000


def write_audit(folder: Path, pairs: Iterable[PreferencePair], seed: int, *, amount: int) -> Path:
    """Draw at most `amount` of the pairs, write the sheet and its key into a folder, and return the path of the page.

    Only the drawn pairs are held. Images judged by themselves are passed over. audit.jsonl has one object a pair:
    `number` (from 1, as on the page), `pair_id`, `prompt`, `left_sha256` and `right_sha256` of the encoded images,
    `left_uid` and `right_uid` where known, `chosen` ("left", "right", null for a tie) and `label_prob`. Raises
    BrokenImage when an image does not decode.
    """
    whole = (pair for pair in pairs if pair.chosen and pair.rejected)
    drawn = heapq.nsmallest(amount, whole, key=lambda pair: _hash("order", seed, pair))
    lines, cards, images = [], [], []
    for number, pair in enumerate(drawn, start=1):
        is_chosen_left = int(_hash("side", seed, pair), 16) % 2 == 0
        sides = [(pair.chosen, pair.chosen_uid), (pair.rejected, pair.rejected_uid)]
        (left, left_uid), (right, right_uid) = sides if is_chosen_left else sides[::-1]
        images += [kept(decode_rgb(left)), kept(decode_rgb(right))]
        key = {
            "number": number,
            "pair_id": pair.pair_id,
            "prompt": pair.prompt,
            "left_sha256": hashlib.sha256(left).hexdigest(),
            "right_sha256": hashlib.sha256(right).hexdigest(),
            "left_uid": left_uid,
            "right_uid": right_uid,
            "chosen": None if pair.label_prob == 0.5 else "left" if is_chosen_left else "right",
            "label_prob": pair.label_prob,
        }
        lines.append(json.dumps(key) + "\n")
        cards.append({"number": number, "pair_id": pair.pair_id, "prompt": shorten(pair.prompt, _PROMPT_CHARACTERS)})
    uris = thumbnails(images)
    for i, card in enumerate(cards):
        card["images"] = list(zip(("left", "right"), uris[2 * i : 2 * i + 2], images[2 * i : 2 * i + 2], strict=True))
    page = fill(
        "audit.html.j2",
        style=asset("report.css") + asset("audit.css"),
        script=asset("audit.js"),
        cards=cards,
        total=count(len(cards), "pairs"),
        small_px=SMALL_PX,
        data=[{name: json.loads(line)[name] for name in ("number", "pair_id", "chosen")} for line in lines],
    )
    for name, text in ((KEY, "".join(lines)), (PAGE, page)):
        with atomic_path(folder / name) as partial:
            partial.write_text(text, encoding="utf-8")
    return folder / PAGE


def _hash(use: str, seed: int, pair: PreferencePair) -> str:
    return hashlib.sha256(f"{use} {seed} {pair.pair_id}".encode()).hexdigest()
