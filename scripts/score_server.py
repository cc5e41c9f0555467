#!/usr/bin/env python
"""A server for scorers of type `http`, and the pattern for one of your own.

    python scripts/score_server.py brightness --port 8000
    python scripts/score_server.py clip_image --port 8001

serves a scorer of this package, one request at a time, to this machine alone, and prints the settings to ask it with.

If a model's packages do not go together with ours, copy this file into an environment of its own, and put the model
behind `make_judge`: it returns a function from PIL images, prompts and reference images (one list an image) to a
value or None for every image, by metric, and to reasons, one an image. What it raises is answered with 500 and one
sentence. All else needs Python and Pillow only.
"""

import argparse
import base64
import io
import json
import math
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Lock
from typing import Any

from PIL import Image

Answer = Callable[[list[Image.Image], list[str], list[list[Image.Image]]], tuple[dict[str, Any], list[str]]]
MAX_BODY_BYTES = 512 * 2**20
MAX_BATCH_SIZE = 64


def make_judge(name: str, url: str) -> Answer:
    """Replace this function by yours."""
    from diffusion_dpo.config import load
    from diffusion_dpo.device import pick_device
    from diffusion_dpo.scorers import ScoreRequest
    from diffusion_dpo.scorers.judge import Judge
    from diffusion_dpo.settings import ScoreConfig

    (scorer,) = load(ScoreConfig, None, [f"scorers=[{name}]"]).scorers
    if "rivals" in scorer.needs:
        raise ValueError(
            f"{scorer.type} compares the images of a prompt, which http does not send: it cannot be served"
        )
    scorer.load(pick_device("auto"))
    worker = Judge(scorer, batch_size=MAX_BATCH_SIZE)  # of an image that the scorer stumbles over it gives NaN
    gives = [vars(m) | {"range": [b if math.isfinite(b) else None for b in m.range]} for m in scorer.metrics]
    settings = {"type": "http", "url": url, "version": scorer.fingerprint(), "sends": sorted(scorer.needs)}
    print(f"scorers=[{json.dumps(settings | {'gives': gives})}]", flush=True)

    def judge(images: list[Image.Image], prompts: list[str], references: list[list[Image.Image]]) -> Any:
        rows = zip(images, prompts, references, strict=True)
        scores = worker.score([ScoreRequest(image, prompt, tuple(others)) for image, prompt, others in rows])
        values = {k: [None if math.isnan(v) else v for v in array.tolist()] for k, array in scores.values.items()}
        return values, list(scores.reasons)

    return judge


class Handler(BaseHTTPRequestHandler):
    judge: Answer
    busy = Lock()
    """Held while the model works: a thread a connection, since one that sends nothing must not hold up the others."""
    timeout = 60

    def do_POST(self) -> None:
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal() or int(length) > MAX_BODY_BYTES:
            return self.answer(413, {"error": f"send a Content-Length of at most {MAX_BODY_BYTES} bytes"})
        try:
            body = json.loads(self.rfile.read(int(length)))
            images = [decode(text) for text in body["images"]]
            prompts = body.get("prompts", [""] * len(images))
            references = [[decode(text) for text in one] for one in body.get("references", [[]] * len(images))]
        except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
            return self.answer(400, {"error": f"not a request: {error}"})
        try:
            with self.busy:
                values, reasons = type(self).judge(images, prompts, references)
        except Exception as error:  # noqa: BLE001 - a model is anybody's code, and one request must not end the rest
            return self.answer(500, {"error": f"{type(error).__name__}: {error}"})
        return self.answer(200, {"metrics": values, "reasons": reasons})

    def answer(self, status: int, content: dict[str, Any]) -> None:
        data = json.dumps(content, allow_nan=False).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


def decode(text: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(text, validate=True)), formats=["PNG"]).convert("RGB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scorer", help="a scorer's name, or its settings as YAML in braces")
    parser.add_argument("--port", type=int, default=8000)
    arguments = parser.parse_args()
    with ThreadingHTTPServer(("127.0.0.1", arguments.port), Handler) as server:
        try:
            judge = make_judge(arguments.scorer, f"http://127.0.0.1:{server.server_port}")
        except ValueError as error:  # diffusion-dpo's ConfigError is one
            parser.exit(2, f"{error}\n")
        Handler.judge = staticmethod(judge)
        server.serve_forever()


if __name__ == "__main__":
    main()
