"""`label`: a web page where people choose between two images, blind; their votes, and the pairs that they make."""

import errno
import importlib.util
import secrets
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from diffusion_dpo.config import ConfigError, command, dump
from diffusion_dpo.console import say
from diffusion_dpo.data.comparisons import is_comparison
from diffusion_dpo.data.votes import LOG
from diffusion_dpo.files import atomic_path, claim, finish, read_manifest
from diffusion_dpo.label.items import make_items, refuse_other_images
from diffusion_dpo.label.log import Log
from diffusion_dpo.label.pairs import write_pairs
from diffusion_dpo.label.study import Study
from diffusion_dpo.settings import LabelConfig

_ANY = ("0.0.0.0", "::")
_DECIDES: Any = {"pairs_per_prompt", "max_pairs", "checks_share", "repeat_share", "seed"}


def run(config: LabelConfig) -> Path:
    """Serve the page until it is stopped, then write the pairs; return the folder."""
    for package in ("starlette", "uvicorn"):
        if importlib.util.find_spec(package) is None:
            raise ConfigError(f"label needs {package}, of the extra `label`: pip install 'diffusion-dpo[label]'")
    with _claimed(config) as identity, _listen(config) as listener, _opened(config, identity) as study:
        port = listener.getsockname()[1]
        token = config.token or secrets.token_urlsafe(18)
        say(f"label: {len(study.items)} pairs, {study.counts()['pair']} votes so far, in {config.output_dir}")
        say(f"open: http://{_netloc(_own_address(config.host), port)}/?token={token}")
        say("Ctrl-C ends it; nothing is lost, and the same command goes on")
        try:
            _serve(config, study, listener, token, port)
        finally:
            _tell(config, study)
    return config.output_dir


def export(config: LabelConfig) -> Path:
    """Write the pairs of the votes so far, without serving a page; return their folder."""
    with _claimed(config) as identity, _opened(config, identity) as study:
        _tell(config, study)
    return config.output_dir


@contextmanager
def _claimed(config: LabelConfig) -> Iterator[dict[str, Any]]:
    """Make a study's folder ours, and yield what the study is known by there."""
    folder = config.output_dir
    source = config.path if config.data is None else config.data.model_dump().get("path")
    if isinstance(source, Path) and not source.exists():  # a text may be the name of a data set on the hub
        raise ConfigError(f"there is no file or folder {source} to label")
    if source is not None and Path(source).exists() and folder.resolve().is_relative_to(Path(source).resolve()):
        raise ConfigError(f"output_dir {folder} lies inside {source}; choose another one")
    asked = {"prompt_column"} if config.prompt_column is not None else set()
    identity = config.model_dump(mode="json", include=_DECIDES | asked)
    with claim(folder, "label", identity):
        with atomic_path(folder / "config.yaml") as partial:  # without what lets others vote, who may read it
            partial.write_text(dump(config.model_copy(update={"token": None})), encoding="utf-8")
        yield identity


@contextmanager
def _opened(config: LabelConfig, identity: dict[str, Any]) -> Iterator[Study]:
    """Yield the study of a folder, whose images are written first where it is new."""
    folder = config.output_dir
    items = make_items(config, folder)
    source = config.model_dump(mode="json", include={"path", "data"})
    if read_manifest(folder).get("source", source) != source:  # perhaps it only moved
        refuse_other_images(config, items)
    finish(folder, "label", identity, num_items=len(items), source=source)
    with Log(folder / LOG) as log:
        yield Study(config, items, log)


def _listen(config: LabelConfig) -> socket.socket:
    """Return a socket at the address of the settings, before anything takes time; who comes early waits."""
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    # TCP by name: where a socket does not say so, asyncio leaves Nagle's algorithm on, and answers come 40 ms late.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((config.host, config.port))
        listener.listen()
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise ConfigError(f"port {config.port} is in use; choose another one, or port=0 for any") from None
        raise ConfigError(f"cannot listen at {config.host}:{config.port}: {error.strerror}") from None
    return listener


def _serve(config: LabelConfig, study: Study, listener: socket.socket, token: str, port: int) -> None:
    from diffusion_dpo.label.connections import make_server
    from diffusion_dpo.label.server import make_app

    names = {config.host.lower()}
    if config.host in ("127.0.0.1", "localhost"):
        names = {"127.0.0.1", "localhost"}
    if config.host in _ANY:  # whoever comes knows the machine by some name; the token decides
        own = {_own_address(host) for host in _ANY}
        names = {socket.gethostname().lower(), "127.0.0.1", "localhost", "::1", *own, *_addresses()}
    hosts = frozenset(_netloc(name, port).removesuffix(":80") for name in names)  # which browsers leave out
    app = make_app(study, config.output_dir, token=token, hosts=hosts)
    make_server(app).run(sockets=[listener])


def _netloc(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _own_address(host: str) -> str:
    """Return an address to open: of all of this machine's, the one that it has in its network; no packet is sent."""
    if host not in _ANY:
        return host
    family, outside = (socket.AF_INET6, "2001:db8::1") if ":" in host else (socket.AF_INET, "192.0.2.1")
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((outside, 9))
            return str(probe.getsockname()[0])
    except OSError:  # no network
        return "::1" if ":" in host else "127.0.0.1"


def _addresses() -> set[str]:
    """Return the addresses that this machine goes by."""
    try:
        return {str(found[4][0]) for found in socket.getaddrinfo(socket.gethostname(), None)}
    except OSError:
        return set()


def _tell(config: LabelConfig, study: Study) -> None:
    """Write the pairs, and say what there is and what to do with it."""
    counts = study.counts()
    folder, num_pairs, drops = write_pairs(study, config.output_dir)
    dropped = "; ".join(f"{number} {reason}" for reason, number in sorted(drops.items())) or "nothing"
    say(f"{counts['pair']} votes, {counts['repeat']} repeats: {config.output_dir / LOG}")
    if num_pairs:
        say(f"{num_pairs} pairs: {folder}; dropped: {dropped}")
    if config.data is None and is_comparison(config.path):
        say(f"next: {command('compare', {'human': config.output_dir})}, with the settings of that comparison")
    elif num_pairs:
        say(f"next: {command('train', {'data.path': folder})}")
