"""The web server of `label`: a page, its images, and votes. Nothing is served to whoever does not bring the token.

A request must name a host that is ours and, where it changes something, come from our own page. The token, new at
every start, comes with the first address and is a cookie afterwards. Images go by opaque names; no path is ever taken
from a request.
"""

import asyncio
import errno
import json
import re
import secrets
from collections import defaultdict
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from jinja2 import Environment, PackageLoader, StrictUndefined
from starlette.applications import Starlette
from starlette.datastructures import MutableHeaders
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, HTMLResponse, JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from diffusion_dpo.data.votes import CHOICES
from diffusion_dpo.label.items import IMAGES
from diffusion_dpo.label.log import SharedLog
from diffusion_dpo.label.results import Results, results_of
from diffusion_dpo.label.study import REASONS, SIDES, Study, Task, UnknownTask
from diffusion_dpo.report import words

_AHEAD = 4
"""Questions that the page is given before they are due, so that the next pair is there when a key is pressed."""
_MOST_BYTES = 4096
_BODY_SECONDS = 10.0
_NAME = re.compile(r"[\w .@-]{1,40}")
_KEY = re.compile(r"[\w-]{8,64}")
"""What the page calls a vote or an undo, so that it can send it again."""
_ASSETS = {"label.js": "text/javascript", "label.css": "text/css", "report.css": "text/css"}
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; form-action 'self'; "
    "base-uri 'none'; frame-ancestors 'none'"
)
_ONWARD = '<!doctype html><title>Labelling</title><meta http-equiv="refresh" content="0; url=/"><a href="/">Go on</a>'
"""Instead of a redirect: where a mail or a chat opens the address, a browser sends no strict cookie along with one."""
_HEADERS = {
    "Content-Security-Policy": _POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}


def make_app(study: Study, folder: Path, *, token: str, hosts: frozenset[str]) -> ASGIApp:
    """Return the application; `hosts` are the values of the Host header that are ours."""
    site = _Site(study, folder, token)
    routes = [
        Route("/", site.home),
        Route("/name", site.who, methods=["GET"]),
        Route("/name", site.name, methods=["POST"]),
        Route("/next", site.upcoming),
        Route("/vote", site.vote, methods=["POST"]),
        Route("/undo", site.undo, methods=["POST"]),
        Route("/results", site.results),
        Route("/image/{name}", site.image),
        Route("/static/{name}", site.asset),
    ]
    handlers: Any = {
        UnknownTask: lambda request, error: _problem(404, str(error)),
        _BadRequest: lambda request, error: _problem(error.status, str(error)),
        OSError: _disk_problem,
        ClientDisconnect: lambda request, error: Response(status_code=400),  # nobody is there to read it
        404: lambda request, error: site.refused(request, 404, "there is no such page here"),
        405: lambda request, error: site.refused(request, 405, "this page takes other requests"),
    }
    inner = Starlette(routes=routes, exception_handlers=handlers)

    async def guard(scope: Scope, receive: Receive, send: Send) -> None:
        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        request = Request(scope) if scope["type"] == "http" else None
        why = request and _refusal(request, token, hosts)
        await (site.refused(request, 403, why) if request and why else inner)(scope, receive, send_guarded)

    return guard


class _Site:
    """What each address answers to whoever has passed the guard."""

    def __init__(self, study: Study, folder: Path, token: str) -> None:
        self.study = study
        self.folder = folder
        self.token = token
        self.log = SharedLog(study.log, study.take)
        self.turns: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        """By rater: held from the making of an event until it is taken."""
        self.counting = asyncio.Lock()
        """Held by whoever works out the results, which takes longer."""
        self.counted: tuple[int, Results | None] = (-1, None)
        """The results, and after how many events."""
        self.pages = Environment(
            loader=PackageLoader("diffusion_dpo.label", "."),
            autoescape=True,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )

    def page(self, template: str, *, status: int = 200, **values: Any) -> Response:
        return HTMLResponse(self.pages.get_template(template).render(words=words, **values), status)

    def refused(self, request: Request, status: int, text: str) -> Response:
        """Say why something is not given: on a page to whoever opens an address in a browser, else as JSON."""
        if "text/html" not in request.headers.get("accept", ""):
            return _problem(status, text)
        return self.page("problem.html.j2", status=status, text=text)

    def state(self, rater: str) -> dict[str, Any]:
        tasks = self.study.tasks(rater, _AHEAD)
        done, total = self.study.progress(rater)
        return {"tasks": [_shown(task) for task in tasks], "done": done, "total": total}

    async def home(self, request: Request) -> Response:
        if "token" in request.query_params:  # checked by the guard: from here on it is a cookie
            response: Response = HTMLResponse(_ONWARD)
            response.set_cookie(_cookie("token", request), self.token, httponly=True, samesite="strict")
            return response
        rater = _rater(request)
        if rater is None:
            return self.page("name.html.j2", rater="")
        return self.page("label.html.j2", rater=rater, study=self.study.name, reasons=REASONS)

    async def who(self, request: Request) -> Response:
        return self.page("name.html.j2", rater=_rater(request) or "")

    async def name(self, request: Request) -> Response:
        given = (await _body(request)).get("name")
        if not isinstance(given, str) or not _NAME.fullmatch(given.strip()):
            return _problem(400, "a name is 1 to 40 letters, digits, spaces, dots, dashes or @")
        response = JSONResponse({"rater": given.strip()})
        value = given.strip().encode().hex()
        response.set_cookie(_cookie("rater", request), value, httponly=True, samesite="strict", max_age=365 * 86400)
        return response

    async def upcoming(self, request: Request) -> Response:
        rater = _known_rater(request)
        return JSONResponse(self.state(rater))

    async def vote(self, request: Request) -> Response:
        rater, body = _known_rater(request), await _body(request)
        answer, reason, key, task = (body.get(name, "") for name in ("answer", "reason", "key", "task"))
        seconds = body.get("seconds", 0.0)
        if not all(isinstance(it, str) for it in (answer, reason, key, task)) or not _KEY.fullmatch(key):
            return _problem(400, "a vote needs the texts `task`, `answer` and `key`")
        if answer not in (*SIDES, *CHOICES[2:]) or (answer == "skip" and reason not in REASONS):
            return _problem(400, f"an answer is one of left, right, tie, both_bad, or skip with {', '.join(REASONS)}")
        if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 <= seconds < 1e6:
            return _problem(400, "`seconds` must be a number from 0 on")
        async with self.turns[rater]:
            event = self.study.vote_event(rater, task, answer, key=key, reason=reason, seconds=float(seconds))
            if event is not None:
                await self.log.append(event)
        return JSONResponse(self.state(rater))

    async def undo(self, request: Request) -> Response:
        rater, key = _known_rater(request), (await _body(request)).get("key")
        if not isinstance(key, str) or not _KEY.fullmatch(key):
            return _problem(400, "an undo needs the text `key`")
        async with self.turns[rater]:
            event = self.study.undo_event(rater, key=key)
            if event is not None:
                await self.log.append(event)
        return JSONResponse({"undone": _shown(self.study.undone(rater, key))} | self.state(rater))

    async def image(self, request: Request) -> Response:
        name = request.path_params["name"]
        file = self.folder / IMAGES / f"{name}.png"
        if not re.fullmatch(r"[0-9a-f]{32}", name) or not file.exists():
            return _problem(404, "there is no such image here")
        # No FileResponse: the time of a file, in its headers, tells which image of a pair was written first.
        try:
            data = file.read_bytes()
        except OSError as error:
            return _problem(500, f"this image cannot be read: {error.strerror}")
        return Response(data, media_type="image/png", headers={"Cache-Control": "private, max-age=86400"})

    async def asset(self, request: Request) -> Response:
        name = request.path_params["name"]
        if name not in _ASSETS:
            return _problem(404, "there is no such file here")
        home = Path(__file__).parents[1] / ("report" if name == "report.css" else "label")
        return FileResponse(home / name, media_type=_ASSETS[name])

    async def results(self, request: Request) -> Response:
        async with self.counting:  # votes go on meanwhile
            if self.study.num_events != self.counted[0]:
                number, votes = self.study.num_events, self.study.standing()
                self.counted = number, await asyncio.to_thread(results_of, votes, self.study.items)
        return self.page("results.html.j2", rater=_rater(request), results=self.counted[1])


class _BadRequest(ValueError):  # noqa: N818 - it names the request
    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


def _refusal(request: Request, token: str, hosts: frozenset[str]) -> str | None:
    """Return why a request is not answered, None where it is."""
    if request.headers.get("host", "").lower() not in hosts:
        return "this address is not ours"
    origin = request.headers.get("origin")
    if request.method == "POST" and (origin is None or origin.partition("://")[2].lower() not in hosts):
        return "a vote must come from our own page"
    given = request.query_params.get("token") or request.cookies.get(_cookie("token", request), "")
    if not secrets.compare_digest(given.encode(), token.encode()):
        return "open the address that `diffusion-dpo label` has printed, with its token"
    return None


def _cookie(name: str, request: Request) -> str:
    """Cookies know no ports: two studies on one machine keep theirs apart by name."""
    return f"{name}-{request.url.port or 80}"


def _rater(request: Request) -> str | None:
    try:
        name = bytes.fromhex(request.cookies.get(_cookie("rater", request), "")).decode()
    except ValueError:
        return None
    return name if _NAME.fullmatch(name) else None


def _known_rater(request: Request) -> str:
    """Return who asks; raises _BadRequest where that is not whom the page was drawn for: sides depend on the rater."""
    rater = _rater(request)
    if rater is None:
        raise _BadRequest(401, "say your name first: reload the page")
    if unquote(request.headers.get("x-rater", "")) != rater:
        raise _BadRequest(409, f"in this browser it is {rater}'s turn now; reload the page, or give your name again")
    return rater


async def _body(request: Request) -> dict[str, Any]:
    """Return the JSON object that a request brings; raises _BadRequest for anything else, much of it or a slow one."""
    data = b""
    try:
        async with asyncio.timeout(_BODY_SECONDS):
            async for chunk in request.stream():
                data += chunk
                if len(data) > _MOST_BYTES:
                    raise _BadRequest(413, f"a request may bring {_MOST_BYTES} bytes")
    except TimeoutError:
        raise _BadRequest(408, f"a request may take {_BODY_SECONDS:.0f} seconds to arrive") from None
    try:
        found = json.loads(data or b"{}")
    except (ValueError, RecursionError):
        raise _BadRequest(400, "the request is not JSON") from None
    if not isinstance(found, dict):
        raise _BadRequest(400, "the request must be a JSON object")
    return found


def _shown(task: Task) -> dict[str, Any]:
    """All that the page may know of a question before it is answered."""
    return {"task": task.id, "prompt": words.clean(task.item.prompt), "images": list(task.images)}


def _problem(status: int, text: str) -> Response:
    # What of a request was not read is not waited for.
    headers = {"Connection": "close"} if status in (408, 413) else None
    return JSONResponse({"error": text}, status_code=status, headers=headers)


def _disk_problem(request: Request, error: Exception) -> Response:
    """Say that a vote could not be written; it is not in the log, and the page keeps it and tries again."""
    number = error.errno if isinstance(error, OSError) else None
    if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return _problem(507, "the disk is full")
    return _problem(500, f"the vote could not be written: {error.strerror if isinstance(error, OSError) else error}")
