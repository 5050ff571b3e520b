"""`make docs` builds without a warning, holds a page per method, and its pages fetch nothing from outside."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest

import lowbit
from lowbit import methods

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    for package in ("mkdocs", "material", "mkdocstrings", "latex2mathml"):
        pytest.importorskip(package, reason=f"{package} is not installed; pip install 'lowbit[docs]' brings it")
    folder = tmp_path_factory.mktemp("docs") / "site"
    # The executed pages have a test of their own.
    environment = {**os.environ, "LOWBIT_DOCS_EXECUTE": "0", "NO_MKDOCS_2_WARNING": "1"}
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    built = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (built.returncode, built.stdout + built.stderr) == (0, "")
    return folder


class Fetched(HTMLParser):
    """What a browser loads with the page: not what a reader may click."""

    def __init__(self) -> None:
        super().__init__()
        self.urls: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        if tag == "link" and values.get("rel") != "canonical":
            self.urls.append(values.get("href", ""))
        self.urls += [values[name] for name in ("src", "srcset", "data", "poster") if name in values]
        self.urls += _in_css(values.get("style", ""))


def _in_css(css: str) -> Iterator[str]:
    yield from re.findall(r"""url\(\s*["']?([^"')]+)""", css)
    yield from re.findall(r"""@import\s+["']([^"']+)""", css)


def test_no_page_fetches_from_outside(site: Path) -> None:
    outside = []
    for page in site.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        parser = Fetched()
        parser.feed(text)
        styles = (url for style in re.findall(r"<style.*?</style>", text, re.DOTALL) for url in _in_css(style))
        outside += [(page.name, url) for url in (*parser.urls, *styles) if re.match(r"(https?:)?//", url)]
    for sheet in site.rglob("*.css"):
        outside += [(sheet.name, url) for url in _in_css(sheet.read_text()) if re.match(r"(https?:)?//", url)]
    assert outside == []


def test_every_picture_is_there(site: Path) -> None:
    for page in site.rglob("*.html"):
        for picture in re.findall(r'<img[^>]* src="([^"]+)"', page.read_text(encoding="utf-8")):
            assert picture.startswith("data:") or (page.parent / picture).is_file(), f"{page.name}: {picture}"


def test_every_method_has_a_page_with_drawings(site: Path) -> None:
    for name in methods.registry:
        text = (site / f"methods/{name}.html").read_text(encoding="utf-8")
        method = methods.registry[name]()
        sides = (method.weight is not None) + (method.activation is not None)
        assert text.count('class="quantizer"') >= sides, name
        for option in methods.registry.options(name):
            assert f"<code>{option}</code>" in text, f"{name}: {option}"


def test_all_formulas_are_rendered(site: Path) -> None:
    for page in site.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        assert "arithmatex" not in text, page
        assert not re.search(r"<mi>\\|<mtext>\\", text), f"{page}: a command that latex2mathml does not know"
    assert "<math" in (site / "backpropagation.html").read_text(encoding="utf-8")


def test_every_public_name_has_an_api_entry(site: Path) -> None:
    """By its anchor, under the module that defines it."""
    anchors = {i for page in (site / "api").glob("*.html") for i in re.findall(r'id="(lowbit[^"]*)"', page.read_text())}
    for name in lowbit.__all__:
        value = getattr(lowbit, name)
        home = getattr(value, "__module__", None)
        known = f"{home}.{name}" in anchors if home else any(a.startswith(f"{value.__name__}.") for a in anchors)
        assert known, name
