"""From photographs of a person to pairs: score by ArcFace against a reference, then pair."""

from pathlib import Path

import insightface
from PIL import Image, ImageFilter

from diffusion_dpo import pair, score
from diffusion_dpo.config import load
from diffusion_dpo.data.images import pixel_hash
from diffusion_dpo.data.shards import CANDIDATES, encode_png, image_struct, read_rows, write_shard
from diffusion_dpo.scorers.faces import NO_FACE
from diffusion_dpo.settings import PairConfig, ScoreConfig
from tests.photos import photo
from tests.scorers.tiny_faces import make_pack

OTHER = Path(insightface.__file__).parent / "data" / "images" / "Tom_Hanks_54745.png"


def test_a_face_that_is_there_wins_and_one_that_is_not_never_does(tmp_path: Path) -> None:
    person = photo(0, (128, 128))
    variations = {
        "same": person,
        "blurred": person.filter(ImageFilter.GaussianBlur(6)),
        "cropped": person.crop((32, 8, 96, 72)).resize((128, 128)),
        "warmer": Image.blend(person, Image.new("RGB", person.size, "orange"), 0.3),
        "other": Image.open(OTHER).convert("RGB").resize((128, 128)),
        "none": Image.new("RGB", (128, 128), (9, 9, 9)),  # dark, and not so black that no scorer is asked
    }
    folder = tmp_path / "candidates"
    folder.mkdir()
    rows = [
        {
            "uid": pixel_hash(image),
            "prompt_id": "portrait",
            "prompt": "a portrait",
            "index": i,
            "seed": i,
            "image": image_struct(encode_png(image)),
            "references": [image_struct(encode_png(person))],
            "origin": "",
            "settings_hash": "0",
        }
        for i, image in enumerate(variations.values())
    ]
    write_shard(folder / "images-00000.parquet", rows, CANDIDATES)
    pack = make_pack(tmp_path / "pack", anywhere=True)
    scorer = f"scorers=[{{type: arcface, model: {pack}, det_size_px: 128}}]"
    score.run(load(ScoreConfig, None, [f"path={folder}", "device=cpu", scorer]))
    found = list(read_rows(folder, pattern="scores-*.parquet"))
    values = {row["uid"]: row["value"] for row in found if row["metric"] == "arcface"}
    reasons = {row["uid"]: row["reason"] for row in found if row["metric"] == "arcface"}
    counts = {row["uid"]: row["value"] for row in found if row["metric"] == "arcface_n_faces"}
    uids = {name: pixel_hash(image) for name, image in variations.items()}
    assert values[uids["same"]] > 0.999
    assert values[uids["none"]] is None and counts[uids["none"]] == 0
    assert reasons[uids["none"]] == NO_FACE, "the scorer itself has looked"
    names = {uid: name for name, uid in uids.items()}

    def paired(out: str, *overrides: str) -> list[tuple[str, str]]:
        pair.run(
            load(PairConfig, None, [f"path={folder}", "metric=arcface", f"output_dir={tmp_path / out}", *overrides])
        )
        rows = read_rows(tmp_path / out, pattern="*.parquet")
        return [(names[row["chosen_uid"]], names[row["rejected_uid"]]) for row in rows]

    ((chosen, rejected),) = paired("plain")
    assert chosen == "same" and rejected not in ("same", "none")
    gates = "[{metric: arcface_n_faces, min: 1}, {metric: arcface, max: 0.999}]"
    ((chosen, rejected),) = paired("gated", f"strategy={{type: gate, gates: {gates}}}")
    assert chosen not in ("same", "none"), "a copy of the reference is barred"
    assert rejected not in ("same", "none")
    losing = paired(
        "losing", f"strategy={{type: gate, gates: {gates}, failed: lose, then: all_pairs}}", "missing=lose"
    )
    assert {loser for _, loser in losing} >= {"same", "none"}
    assert not {winner for winner, _ in losing} & {"same", "none"}
