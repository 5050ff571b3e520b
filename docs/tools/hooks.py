"""MkDocs hook: pages made from the code, executed pages, formulas as MathML, so that no page fetches from outside."""

from __future__ import annotations

import html
import os
import re
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import latex2mathml.converter
import method_pages
import survey
from execute import run_blocks, with_output
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from lowbit import methods

ROOT = Path(__file__).parents[2]
FROM_ROOT = {"index.md": "README.md", "contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md"}
EXECUTED = ("tutorial.md", "backpropagation.md")
EXECUTE = os.environ.get("LOWBIT_DOCS_EXECUTE", "1") != "0"
REPORT = "report.html"
_FRAME = (
    f'<iframe class="report" src="{REPORT}" title="The report"></iframe>\n\n'
    f'<a href="{REPORT}">Open the report on a page of its own.</a>'
)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Put every registered method into the navigation."""
    for section in config.nav or []:
        if isinstance(section, dict) and "Methods" in section:
            section["Methods"] += [f"methods/{name}.md" for name in methods.registry]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages, and what the tutorial writes."""
    made = {f"methods/{name}.md": method_pages.page(name) for name in methods.registry}
    made["methods/index.md"] = method_pages.overview()
    made |= {page: _localise((ROOT / source).read_text(encoding="utf-8")) for page, source in FROM_ROOT.items()}
    for name in EXECUTED:
        source = ROOT / "docs" / name
        text = source.read_text(encoding="utf-8")
        if EXECUTE:
            with tempfile.TemporaryDirectory() as folder:
                text = with_output(text, run_blocks(text, Path(folder), str(source)))
                report = Path(folder) / REPORT
                if report.is_file():
                    files.append(File.generated(config, REPORT, content=report.read_bytes()))
                    text = text.replace("<!-- report -->", _FRAME)
        made[name] = text
    made["survey.md"] = survey.linked((ROOT / "docs/survey.md").read_text(encoding="utf-8"), set(methods.registry))
    for source in sorted((ROOT / "docs").glob("*.md")):
        text = made.get(source.name) or source.read_text(encoding="utf-8")
        plots = re.findall(r"\]\(\.\./(results/\S+\.svg)\)", text)
        if plots:
            made[source.name] = text.replace("](../results/", "](results/")
        for plot in plots:
            files.append(File.generated(config, plot, content=(ROOT / plot).read_bytes()))
    for path, text in made.items():
        present = files.get_file_from_path(path)
        if present is not None:
            files.remove(present)
        files.append(File.generated(config, path, content=text))
    return files


def on_page_content(content: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Render the formulas that pymdownx.arithmatex marked."""
    return _MARKED.sub(_to_mathml, content)


_MARKED = re.compile(
    r'<(?P<tag>span|div) class="arithmatex">\\(?P<open>[(\[])(?P<tex>.*?)\\[)\]]</(?P=tag)>', re.DOTALL
)


def _to_mathml(match: re.Match[str]) -> str:
    display = "block" if match["open"] == "[" else "inline"
    tex = html.unescape(re.sub(r"<[^>]*>", "", match["tex"])).strip()
    # latex2mathml has no \arg.
    tex = re.sub(r"\\arg(?![a-z])", r"\\operatorname{arg}", tex)
    return _tidy(latex2mathml.converter.convert(tex, display=display))


_TIGHT = 'stretchy="false" lspace="0" rspace="0"'
_OPENING = r"(?:<mrow>|<mo[^>]*>(?!&#x0002[9]|&#x0005D|&#x0007[CD])[^<]*</mo>)"


def _tidy(mathml: str) -> str:
    """Spacing and words, which latex2mathml leaves to chance.

    What ``\\mathrm{word}`` gave as single letters becomes one word; bars hug what they enclose; a minus sign behind an
    opening bracket or a relation belongs to its number; a differential is a letter.
    """

    def word(match: re.Match[str]) -> str:
        return f"<mi>{''.join(re.findall(r'>(.)<', match[0]))}</mi>"

    mathml = re.sub(r'(?:<mi mathvariant="normal">[A-Za-z]</mi>){2,}', word, mathml)
    mathml = re.sub(r"<mo[^>]*>(&#x0007C;|&#x02016;)</mo>", rf"<mo {_TIGHT}>\1</mo>", mathml)
    mathml = re.sub(rf"({_OPENING})<mo>&#x02212;</mo>", r'\1<mo form="prefix">&#x02212;</mo>', mathml)
    return mathml.replace("<mo>&#x02202;</mo>", "<mi>&#x02202;</mi>")


def _localise(markdown: str) -> str:
    """Links of a page at the root of the repository, as seen from docs/."""

    def relink(match: re.Match[str]) -> str:
        image, text, target = match.groups()
        if re.match(r"[a-z]+:|#", target):
            return match[0]
        pages = {source: page for page, source in FROM_ROOT.items()}
        path, hash_, anchor = target.partition("#")
        new = pages.get(path, path.removeprefix("docs/"))
        if path in pages or (path.startswith("docs/") and (ROOT / path).is_file()):
            return f"{image}[{text}]({new}{hash_}{anchor})"
        return "" if image else text

    return re.sub(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)", relink, markdown)
