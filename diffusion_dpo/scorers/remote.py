"""JSON over HTTP: what the judges behind a server have in common. One function asks, waits, retries, gives up."""

import base64
import http.client
import io
import json
import os
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from queue import SimpleQueue
from threading import Event, Thread
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

from pydantic import ConfigDict, Field, field_validator, model_validator

from diffusion_dpo.config import ConfigError
from diffusion_dpo.console import plain
from diffusion_dpo.scorers import Scorer
from diffusion_dpo.web import HttpError, TooLargeError, fetch

if TYPE_CHECKING:
    import torch
    from PIL import Image

MAX_ANSWER_BYTES = 16 * 2**20
_FIRST_WAIT_SECONDS = 0.5
_MAX_WAIT_SECONDS = 60.0
_QUOTED_CHARACTERS = 200
"""How much of an answer an error message repeats."""
_ADVICE = {
    401: "set api_key_env to the environment variable that holds a valid key",
    403: "set api_key_env to the environment variable that holds a valid key",
    404: "mend `url`",
    413: "lower batch_size",
}


T = TypeVar("T")


class Refused(ConfigError):  # noqa: N818 - what the server did
    """The server refused a request (4xx); `answer` is what it said."""

    def __init__(self, text: str, answer: str) -> None:
        super().__init__(text)
        self.answer = answer


class RemoteScorer(Scorer):
    """A judge behind a URL: where it is, how long to wait, and which environment variable holds the key."""

    model_config = ConfigDict(hide_input_in_errors=True)

    url: str
    """Address of the server, http:// or https://."""
    api_key_env: str | None = None
    """Name of the environment variable with the API key; the key itself is never stored."""
    timeout_seconds: float = Field(60.0, gt=0)
    """How long one request may take, from the look-up of the server's name to the last byte of its answer."""
    max_retries: int = Field(4, ge=0)
    """How often a request is sent again, ever later, when the server cannot be reached, is busy (429) or fails (5xx);
    what it refuses (4xx) is not sent again."""

    @model_validator(mode="before")
    @classmethod
    def _url_holds_no_secret(cls, data: Any) -> Any:
        """A check of the whole block, since the error of a field repeats its value."""
        url = str(data.get("url")) if isinstance(data, dict) else ""
        if any(mark in url for mark in "?#@"):
            raise ValueError(
                "url must hold no user, no password and nothing after ? or #, since it is stored and shown; put the "
                "key into an environment variable and set api_key_env to its name"
            )
        return data

    @field_validator("url")
    @classmethod
    def _url_can_be_asked(cls, url: str) -> str:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or not url.isascii() or " " in url:
            raise ValueError("must be an http:// or https:// address")
        return url

    def load(self, device: "torch.device") -> None:
        """See that the key is there; raises ConfigError."""
        read_api_key(self.api_key_env)

    def post(self, url: str, body: Mapping[str, Any], stop: Event | None = None) -> Any:
        """Return the server's answer, as `post_json`, with the key and the patience of the settings."""
        return post_json(
            url,
            body,
            api_key=read_api_key(self.api_key_env),
            timeout_seconds=self.timeout_seconds,
            max_retries=self.max_retries,
            stop=stop or Event(),
        )


def read_api_key(name: str | None) -> str | None:
    """Return the key that an environment variable holds; raises ConfigError, without the key, when it is no key."""
    if name is None:
        return None
    key = os.environ.get(name, "").strip()
    if not key:
        raise ConfigError(f"api_key_env names the environment variable {name!r}, which is not set; set it to your key")
    if not key.isascii() or not key.isprintable():
        raise ConfigError(f"the environment variable {name!r} holds more than one line of plain characters; mend it")
    return key


def as_png(image: "Image.Image") -> str:
    """Return an image as a PNG file in base64."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", compress_level=1)
    return base64.b64encode(buffer.getvalue()).decode()


def in_parallel(work: Callable[[T, Event], None], items: list[T], num_threads: int) -> None:
    """Do the work on each item, `num_threads` at a time; raises what the first one that failed raised.

    `work` gets the event that asks it to stop: after a failure, what is in flight may end and nothing else begins.
    Ctrl-C and a deadline wait for nothing: the threads are daemons, which hold up no exit, as a pool's would.
    """
    todo, stop = iter(items), Event()  # the next of a list's iterator is taken by one thread alone
    ended: SimpleQueue[BaseException | None] = SimpleQueue()

    def run() -> None:
        try:
            for item in todo:
                if stop.is_set():
                    break
                work(item, stop)
        except BaseException as error:  # noqa: BLE001 - raised again below, in the thread that waits
            stop.set()
            ended.put(error)
        else:
            ended.put(None)

    threads = [Thread(target=run, daemon=True) for _ in range(min(num_threads, len(items)))]
    try:
        for thread in threads:
            thread.start()
        failures = [error for error in (ended.get() for _ in threads) if error is not None]
    finally:
        stop.set()
    if failures:
        raise failures[0]


def post_json(
    url: str,
    body: Mapping[str, Any],
    *,
    api_key: str | None,
    timeout_seconds: float,
    max_retries: int,
    stop: Event,
) -> Any:
    """Post JSON and return the JSON that comes back, all of its numbers as they are written.

    Once `stop` is set it waits for no retry and sends none.

    Raises Refused on 4xx, and ConfigError when there is no answer after the retries, when it is larger than
    MAX_ANSWER_BYTES, or when it is not JSON (which knows no NaN and no Infinity).
    """
    data = json.dumps(body, allow_nan=False).encode()
    for tries in range(1, max_retries + 2):
        retry_after: float | None = None
        try:
            return _parsed(url, _ask_once(url, data, api_key, timeout_seconds))
        except HttpError as error:
            answer = _without_key(error.body.decode("utf-8", errors="replace"), api_key)
            trouble = f"{error.code} {quoted(error.reason)}" + (f" ({quoted(answer)})" if answer else "")
            if error.code != 429 and error.code < 500:
                advice = _ADVICE.get(error.code, "mend the settings" if error.code >= 400 else "mend `url`")
                raise Refused(f"{url} refused the request with {trouble}; {advice}", answer) from None
            retry_after = _seconds(error.retry_after)
        except (OSError, http.client.HTTPException) as error:
            reason = error.reason if isinstance(error, urllib.error.URLError) else error
            late = isinstance(reason, TimeoutError)
            trouble = f"no answer within timeout_seconds={timeout_seconds:g}" if late else quoted(str(reason))
            trouble = trouble or type(reason).__name__
        wait = _FIRST_WAIT_SECONDS * 2 ** (tries - 1) if retry_after is None else retry_after
        if tries > max_retries or stop.wait(min(wait, _MAX_WAIT_SECONDS)):
            break
    times = f"{tries} tries, the last of which ended with" if tries > 1 else "1 try:"
    raise ConfigError(
        f"{url} gave no answer after {times} {trouble.replace(api_key or chr(0), '[key]')}; see that the server runs "
        "and that `url` is right, or raise timeout_seconds or max_retries"
    )


def _ask_once(url: str, data: bytes, api_key: str | None, timeout_seconds: float) -> str:
    headers = {"Content-Type": "application/json", "Accept": "application/json", "User-Agent": "diffusion-dpo"}
    request = urllib.request.Request(url, data, headers, method="POST")
    if api_key:
        request.add_unredirected_header("Authorization", f"Bearer {api_key}")
    try:
        content = fetch(request, timeout_seconds=timeout_seconds, max_bytes=MAX_ANSWER_BYTES)
    except TooLargeError:
        raise ConfigError(
            f"{url} answered with more than {MAX_ANSWER_BYTES // 2**20} MiB, which is no list of scores; see that "
            "`url` is right"
        ) from None
    return _without_key(content.decode("utf-8", errors="replace"), api_key)


def _parsed(url: str, text: str) -> Any:
    def refuse(name: str) -> None:
        raise ValueError(f"{name} is not JSON, use null")

    try:
        return json.loads(text, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        reason = str(error) if "is not JSON" in str(error) else "it is not JSON"
        raise ConfigError(f"cannot use the answer of {url}, {reason}: {quoted(text) or 'empty'}") from None


def _without_key(text: str, api_key: str | None) -> str:
    """Remove the key from what a server said: it will be logged."""
    return text.replace(api_key, "[key]") if api_key else text


def quoted(text: str) -> str:
    """Return the start of what a server said, on one line and without what moves a terminal's cursor."""
    return plain(" ".join(text[: 10 * _QUOTED_CHARACTERS].split())[:_QUOTED_CHARACTERS])


def _seconds(retry_after: str | None) -> float | None:
    """Read `Retry-After: 3`; a date is rare, and waited for as for no header at all."""
    text = (retry_after or "").strip()
    return float(text) if text.isascii() and text.isdigit() else None
