"""Pages of Markdown, checked: their Python runs, their links lead somewhere, the commands that they name exist.

Every complaint begins with ``file:line: ``.
"""

from __future__ import annotations

import re
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from markdown_it import MarkdownIt
from markdown_it.token import Token

_PARSER = MarkdownIt("commonmark", {"html": True}).enable("table")
_COMMAND = re.compile(
    r"\bpython -m (?P<module>[\w.]+)(?: (?P<word>[a-z][a-z0-9-]*)\b)?|(?:^|[\s&;(])make (?P<target>[a-z][a-z-]*)"
)
_HTML_LINK = re.compile(r'\b(?:src|srcset|href)="([^"]+)"')
_FOLDERS = ("lmn_kernels", "python_ref", "bench", "tests", "csrc", "docs")
_PATH = re.compile(rf"(?:{'|'.join(_FOLDERS)})/[\w./-]*")


@dataclass(frozen=True)
class Code:
    """A fenced block, or a span of code in the text; ``line`` is that of its first line of code, from 1."""

    language: str
    text: str
    line: int


class Page:
    """One page.

    Attributes:
        path: of its file.
        name: as it stands in complaints, relative to ``root``.
        codes: fenced blocks and spans of code.
        links: targets of links and pictures, with their lines.
        anchors: names that a link's fragment may have, as GitHub makes them of headings.
    """

    def __init__(self, path: Path, root: Path):
        self.path, self.root, self.name = path, root, path.relative_to(root).as_posix()
        self.codes: list[Code] = []
        self.links: list[tuple[str, int]] = []
        self.anchors: set[str] = set()
        tokens, line = _PARSER.parse(path.read_text(encoding="utf-8")), 1
        for token, following in zip(tokens, [*tokens[1:], None], strict=True):
            # Cells of a table have no line of their own; their row has.
            line = token.map[0] + 1 if token.map else line
            self._read(token, following, line)

    def _read(self, token: Token, following: Token | None, line: int) -> None:
        if token.type == "fence":
            self.codes.append(Code(token.info.split(" ")[0], token.content, line + 1))
        elif token.type == "html_block":
            self.links += [(target, line) for target in _HTML_LINK.findall(token.content)]
        elif token.type == "heading_open" and following is not None:
            self._add_anchor("".join(part.content for part in following.children or []))
        elif token.type == "inline":
            # A parsed line break is a token: what stands behind it is a line further down.
            for part in token.children or []:
                if part.type in ("softbreak", "hardbreak"):
                    line += 1
                elif part.type == "code_inline":
                    self.codes.append(Code("", part.content, line))
                elif part.type in ("link_open", "image"):
                    self.links.append((str(part.attrs.get("href") or part.attrs.get("src")), line))
                elif part.type == "html_inline":
                    self.links += [(target, line) for target in _HTML_LINK.findall(part.content)]

    def _add_anchor(self, heading: str) -> None:
        slug = re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")
        count = sum(re.fullmatch(rf"{re.escape(slug)}(-\d+)?", known) is not None for known in self.anchors)
        self.anchors.add(f"{slug}-{count}" if count else slug)

    def blocks(self, language: str) -> list[Code]:
        return [code for code in self.codes if code.language == language]


def run(page: Page) -> None:
    """Run the page's Python, block after block in one namespace, in the current folder.

    Raises:
        AssertionError: a block raised; the complaint has the line in the page, and the error.
    """
    namespace: dict[str, Any] = {"__name__": "__page__"}
    for block in page.blocks("python"):
        try:
            # Lines are those of the page, in tracebacks and in syntax errors.
            exec(compile("\n" * (block.line - 1) + block.text, page.name, "exec"), namespace)
        except Exception as error:
            frames = traceback.extract_tb(error.__traceback__)
            line = next((frame.lineno for frame in reversed(frames) if frame.filename == page.name), None)
            line = error.lineno if isinstance(error, SyntaxError) and error.filename == page.name else line
            raise AssertionError(f"{page.name}:{line}: {type(error).__name__}: {error}") from error


def broken_links(page: Page) -> Iterator[str]:
    """Relative links without a file, or without the heading that they name."""
    for target, line in page.links:
        parts = urlsplit(target)
        if parts.scheme or parts.netloc:
            continue
        file = page.path if not parts.path else (page.path.parent / unquote(parts.path)).resolve()
        if not file.exists() or not file.is_relative_to(page.root.resolve()):
            yield f"{page.name}:{line}: there is no {target}"
        elif parts.fragment and parts.fragment not in Page(file, page.root.resolve()).anchors:
            yield f"{page.name}:{line}: {file.name} has no heading #{parts.fragment}"


def unknown_commands(page: Page, targets: Sequence[str], runs: Sequence[str]) -> Iterator[str]:
    """Commands that name a module that cannot be run, or a target or measurement that there is not.

    Args:
        targets: of ``make``.
        runs: what may stand behind ``python -m bench``.
    """
    for code, line in _lines_of(page):
        for found in _COMMAND.finditer(code):
            module, word, target = found["module"], found["word"], found["target"]
            if target is not None and target not in targets:
                yield f"{page.name}:{line}: there is no target {target} in the Makefile"
            if module is not None and not _runs(module):
                yield f"{page.name}:{line}: python -m {module} runs nothing"
            if module == "bench" and word is not None and word not in runs:
                yield f"{page.name}:{line}: python -m bench has no {word}"


def missing_paths(page: Page) -> Iterator[str]:
    """Files and folders of this house that are named in the text, and are not there; NAME stands for any."""
    for code in page.codes:
        if not code.language and _PATH.fullmatch(code.text) and "NAME" not in code.text:
            if not (page.root / code.text).exists():
                yield f"{page.name}:{code.line}: there is no {code.text}"


def _lines_of(page: Page) -> Iterator[tuple[str, int]]:
    for code in page.codes:
        if code.language != "python":
            yield from ((text, code.line + number) for number, text in enumerate(code.text.splitlines()))


def _runs(module: str) -> bool:
    try:
        spec = find_spec(module)
        if spec is None or spec.submodule_search_locations is None:
            return spec is not None
        return find_spec(f"{module}.__main__") is not None
    except ModuleNotFoundError:
        return False
