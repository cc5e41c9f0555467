"""Servers on real sockets that the tests of remote judges talk to, each in a thread of its own."""

import base64
import io
import json
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
from PIL import Image


@dataclass
class Reply:
    """What a server says: JSON, or bytes as they are."""

    content: Any
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass
class Served:
    """A server at work, and what it was asked: (path, headers, body)."""

    url: str
    asked: list[tuple[str, dict[str, str], Any]] = field(default_factory=list)


def serve(answer: Callable[[Any], Reply]) -> Served:
    """Answer every POST in a daemon thread, until the process ends."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            served.asked.append((self.path, dict(self.headers), body))
            reply = answer(body)
            data = reply.content if isinstance(reply.content, bytes) else json.dumps(reply.content).encode()
            self.send_response(reply.status)
            for name, value in {"Content-Length": str(len(data)), **reply.headers}.items():
                self.send_header(name, value)
            self.end_headers()
            try:
                self.wfile.write(data)
            except OSError:
                pass  # the client has heard enough

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    served = Served(f"http://127.0.0.1:{server.server_port}")
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    return served


def decode(text: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(text.removeprefix("data:image/png;base64,"), validate=True)))


def light(image: Image.Image) -> float:
    return float(np.asarray(image, np.float64).mean() / 255)


def score_light(body: Any) -> Reply:
    """A judge of images: how light they are, or how near in that to the first reference."""
    images = [decode(text) for text in body["images"]]
    if "references" in body:
        near = [1 - abs(light(i) - light(decode(r[0]))) for i, r in zip(images, body["references"], strict=True)]
        return Reply({"metrics": {"remote_near": near}})
    return Reply({"metrics": {"remote_light": [light(image) for image in images]}})


def chat(say: Callable[[Sequence[Image.Image]], str]) -> Served:
    """An endpoint of chat completions; `say` looks at the images of a request, in order, and says something."""

    def answer(body: Any) -> Reply:
        (message,) = body["messages"]
        assert body["temperature"] == 0
        images = [decode(part["image_url"]["url"]) for part in message["content"] if part["type"] == "image_url"]
        return Reply({"choices": [{"message": {"role": "assistant", "content": say(images)}}]})

    return serve(answer)


def lighter(images: Sequence[Image.Image]) -> str:
    """Prefer the lighter image, or say A of two that are light and much alike; one image by itself gets points."""
    if len(images) == 1:
        return json.dumps({"points": 1 + round(light(images[0]) * 1000) % 10})
    first, second = map(light, images[-2:])
    alike = min(first, second) > 0.4 and abs(first - second) < 0.06
    verdict = "A" if first > second or alike else "B"
    return f'Well.\n```json\n{{"reason": "light", "verdict": "{verdict}"}}\n```'
