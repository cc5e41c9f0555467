"""A stand-in for the Hugging Face hub: the few addresses that a push calls, over real HTTP."""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_abcdefghijklmnopqrstuvwxyz0123456789"


class Hub:
    """What was asked for, and what the repositories hold: {repo: {path: bytes}}."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, str]] = []
        self.private: dict[str, bool] = {}
        self.files: dict[str, dict[str, bytes]] = {}
        self.large: dict[str, bytes] = {}
        self.fails: dict[str, int] = {}
        """A part of an address, and the status that it answers with instead."""
        self.url = ""


class _Handler(BaseHTTPRequestHandler):
    hub: Hub

    def log_message(self, *_: object) -> None:
        """Stay silent."""

    def do_PUT(self) -> None:
        self.hub.calls.append(("PUT", self.path))
        for part, status in self.hub.fails.items():
            if part in self.path:
                self._answer({"error": f"no: Bearer {TOKEN}"}, status)
                return
        self.hub.large[self.path.rpartition("/")[2]] = self._body()
        self._answer({})

    def do_POST(self) -> None:
        path, body = self.path.partition("?")[0], self._body()
        self.hub.calls.append(("POST", path))
        for part, status in self.hub.fails.items():
            if part in path:
                self._answer({"error": f"no: {self.headers['authorization']}"}, status)
                return
        if self.headers["authorization"] != f"Bearer {TOKEN}":
            self._answer({"error": "Invalid credentials"}, 401)
        elif path == "/api/validate-yaml":
            self._answer({"errors": [], "warnings": []})
        elif path == "/api/repos/create":
            self._create(json.loads(body))
        elif path.endswith("/preupload/main"):
            self._answer({"files": [self._mode(file) for file in json.loads(body)["files"]]})
        elif path.endswith(".git/info/lfs/objects/batch"):
            self._answer({"transfer": "basic", "objects": [self._place(it) for it in json.loads(body)["objects"]]})
        elif path.endswith("/commit/main"):
            self._commit(path.removeprefix("/api/models/").removesuffix("/commit/main"), body)
        else:
            self._answer({"error": f"nobody knows {path}"}, 404)

    def _create(self, asked: dict[str, Any]) -> None:
        name = f"{asked['organization']}/{asked['name']}"
        status = 409 if name in self.hub.files else 200
        self.hub.private.setdefault(
            name, asked["visibility"] == "private" if "visibility" in asked else asked["private"]
        )
        self.hub.files.setdefault(name, {})
        self._answer({"url": f"{self.hub.url}/{name}", "error": "it is there already"}, status)

    def _mode(self, file: dict[str, Any]) -> dict[str, Any]:
        large = file["path"].endswith((".safetensors", ".png"))
        return {"path": file["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}

    def _place(self, item: dict[str, Any]) -> dict[str, Any]:
        return {**item, "actions": {"upload": {"href": f"{self.hub.url}/large/{item['oid']}"}}}

    def _commit(self, repo: str, body: bytes) -> None:
        for line in body.decode().splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                self.hub.files[repo][value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                data = self.hub.large[value["oid"]]
                assert hashlib.sha256(data).hexdigest() == value["oid"]
                self.hub.files[repo][value["path"]] = data
        self._answer({"commitUrl": f"{self.hub.url}/{repo}/commit/{'0' * 40}", "commitOid": "0" * 40})

    def _body(self) -> bytes:
        if self.headers.get("transfer-encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("content-length", 0)))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _answer(self, data: dict[str, Any], status: int = 200) -> None:
        body = json.dumps(data).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@contextmanager
def hub_server() -> Iterator[Hub]:
    """Run a hub on a free port of this machine."""
    hub = Hub()
    with ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub})) as server:
        hub.url = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join()
