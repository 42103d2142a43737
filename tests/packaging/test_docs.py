"""The pages are true: their Python runs, their links lead somewhere, and what they name is there."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.runs.command import RUNS
from lmn_kernels.backend import env
from tests.support.pages import Page, broken_links, missing_paths, run, unknown_commands

ROOT = Path(__file__).resolve().parents[2]
RUNNING = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES = [*RUNNING, ROOT / "CHANGELOG.md", ROOT / "csrc" / "README.md", ROOT / "tests" / "emulated_cuda" / "README.md"]
TARGETS = re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
MEASUREMENTS = (*RUNS, "report", "list")


def _name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def _page(folder: Path, text: str, name: str = "page.md") -> Page:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return Page(path, folder)


# The pages


@pytest.mark.parametrize("path", RUNNING, ids=_name)
def test_the_python_of_a_page_runs(path: Path, elsewhere: Path) -> None:
    run(Page(path, ROOT))


@pytest.mark.parametrize("path", [*PAGES, ROOT / "bench" / "results" / "README.md"], ids=_name)
def test_links_lead_somewhere(path: Path) -> None:
    assert [*broken_links(Page(path, ROOT))] == []


@pytest.mark.parametrize("path", PAGES, ids=_name)
def test_commands_and_paths_exist(path: Path) -> None:
    page = Page(path, ROOT)
    assert [*unknown_commands(page, TARGETS, MEASUREMENTS), *missing_paths(page)] == []


def test_the_readme_is_short_and_names_every_page() -> None:
    readme = ROOT / "README.md"
    assert len(readme.read_text(encoding="utf-8").splitlines()) <= 150
    linked = {target.partition("#")[0] for target, _ in Page(readme, ROOT).links}
    pages = {_name(path) for path in RUNNING} - {"README.md"}
    assert pages <= linked


def _reasons(source: Path) -> Iterator[str]:
    """What `NotBuilt` is raised with, as words between what is filled in."""
    for function in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
        if not isinstance(function, ast.FunctionDef):
            continue
        named = {
            target.id: node.value
            for node in ast.walk(function)
            if isinstance(node, ast.Assign)
            for target in node.targets
            if isinstance(target, ast.Name)
        }
        for node in ast.walk(function):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "NotBuilt":
                [reason] = node.args
                reason = named[reason.id] if isinstance(reason, ast.Name) else reason
                parts = reason.values if isinstance(reason, ast.JoinedStr) else [reason]
                yield "".join(
                    part.value if isinstance(part, ast.Constant) and isinstance(part.value, str) else "…"
                    for part in parts
                )


def test_installing_explains_every_reason_and_every_variable() -> None:
    said = " ".join((ROOT / "docs" / "install.md").read_text(encoding="utf-8").replace("`", "").split())
    reasons = [*_reasons(ROOT / "setup.py")]
    assert len(reasons) >= 9
    assert [reason for reason in reasons if reason not in said] == []
    docstring = ast.get_docstring(ast.parse((ROOT / "setup.py").read_text(encoding="utf-8"))) or ""
    variables = {env.BACKEND, env.DEBUG, *re.findall(r"\b[A-Z_]{3,}\b", docstring.split("The environment")[1])}
    assert {"LMN_KERNELS_BUILD", "MAX_JOBS", "CXX"} <= variables
    assert variables <= set(re.findall(r"\b[A-Z_]{3,}\b", said))


# The checker


def test_a_broken_block_is_found_by_file_and_line(elsewhere: Path) -> None:
    good = "# Title\n\n```python\nx = 1\n```\n\ntext\n\n```python\nassert x == 1\n"
    run(_page(elsewhere, good + "```\n"))
    with pytest.raises(AssertionError, match=r"^page\.md:11: ZeroDivisionError: division by zero"):
        run(_page(elsewhere, good + "x / 0\n```\n"))
    with pytest.raises(AssertionError, match=r"^page\.md:12: SyntaxError: "):
        run(_page(elsewhere, good + "\nx = = 2\n```\n"))
    # Inside a function of the page the line is its own, not the caller's; other languages do not run.
    nested = "```\nx = = 2\n```\n```python\ndef f():\n    return {}['key']\n\nf()\n```\n"
    with pytest.raises(AssertionError, match=r"^page\.md:6: KeyError: 'key'"):
        run(_page(elsewhere, nested))


def test_pages_do_not_see_each_others_names(elsewhere: Path) -> None:
    run(_page(elsewhere, "```python\nx = 1\n```\n"))
    with pytest.raises(AssertionError, match=r"^page\.md:2: NameError"):
        run(_page(elsewhere, "```python\nx\n```\n"))


def test_broken_links_are_found_by_file_and_line(tmp_path: Path) -> None:
    _page(tmp_path, "# One `two`: three\n\n## Again\n\n## Again\n", "other.md")
    text = (
        "[good](other.md#one-two-three) [good](other.md#again-1) [out](https://example.org/missing.md)\n"
        "and [bad](missing.md)\n\n| a |\n|---|\n| x |\n| [bad](other.md#again-2) |\n\n"
        "[same](#here) [bad][ref]\n\n# Here\n\n[ref]: #there\n\n"
        '<picture><source srcset="no.svg"><img src="other.md"></picture>\n\nhidden <img src="gone.svg">\n'
    )
    assert [*broken_links(_page(tmp_path, text))] == [
        "page.md:2: there is no missing.md",
        "page.md:7: other.md has no heading #again-2",
        "page.md:9: page.md has no heading #there",
        "page.md:15: there is no no.svg",
        "page.md:17: there is no gone.svg",
    ]
    inside = tmp_path / "inside"
    inside.mkdir()
    assert [*broken_links(_page(inside, "[out](../other.md)\n"))] == ["page.md:1: there is no ../other.md"]


def test_unknown_commands_and_paths_are_found_by_file_and_line(tmp_path: Path) -> None:
    text = (
        "Run `make test`, `python -m bench report` or `python -m bench.gpu.check --out DIR`; to make much is fine.\n"
        "`make nothing` and\n`python -m bench nothing`\n\n"
        "```\ncd x && make all\npython -m bench.nothing\nA=1 .venv/bin/python -m bench.lm\n```\n\n"
        "`lmn_kernels/ops`, `lmn_kernels/gone.py` and `lmn_kernels/ops/NAME.py`\n"
    )
    (tmp_path / "lmn_kernels" / "ops").mkdir(parents=True)
    page = _page(tmp_path, text)
    assert [*unknown_commands(page, ["test"], ["report"])] == [
        "page.md:2: there is no target nothing in the Makefile",
        "page.md:3: python -m bench has no nothing",
        "page.md:6: there is no target all in the Makefile",
        "page.md:7: python -m bench.nothing runs nothing",
        "page.md:8: python -m bench.lm runs nothing",
    ]
    assert [*missing_paths(page)] == ["page.md:11: there is no lmn_kernels/gone.py"]
