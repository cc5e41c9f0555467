"""Pages in headless Chromium, and the elements of a page."""

import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
_OFF = ["gpu", "quic", "background-networking", "component-update", "sync"]
_FLAGS = ["--headless", "--no-sandbox", "--no-first-run", *(f"--disable-{what}" for what in _OFF), "--dump-dom"]
HOSTILE = [
    '<script>document.documentElement.dataset.ran = "1"</script>',
    '"><img src=x onerror="document.documentElement.dataset.ran = 1">',
    "</script><script>document.documentElement.dataset.ran = 1</script>",
    "{{ 7 * 7 }} {% raw %} javascript:alert(1)",
    "\u202eright to left\x00 \ud800 lone",
    "long " * 20_000,
    "<!-- ]]> <svg/onload=alert(1)> ' \" &amp; \u2028",
]
"""Prompts that try to be more than text."""


class Elements(HTMLParser):
    """Every start tag of a page, with its attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))


def run_page(page: Path, profile: Path) -> dict[str, str | None]:
    """Open a page, let its script run, and return the attributes of its root element."""
    command = [str(CHROMIUM), *_FLAGS, "--virtual-time-budget=3000", f"--user-data-dir={profile}", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    root = next((attributes for tag, attributes in Elements(done.stdout).tags if tag == "html"), None)
    assert root is not None, done.stderr
    return root
