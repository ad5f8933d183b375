"""What mkdocs is told beside mkdocs.yml: pages stay where they lie in the repository, so that their links hold on the
site as they do in a checkout, and two references are made from the code: of commands and of Python."""

from __future__ import annotations

import importlib
import inspect
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("docs", "examples", "fa2gen", "generated", "specs", "templates", "tests")
MODULES = ("fa2gen", "fa2gen.distributed", "fa2gen.integrations.transformers", "fa2gen.padding")
"""Whose public names the reference of Python has."""
WIDTH = 100
_LINK = re.compile(r"\]\(([^)\s#]+)(?:#[^)]*)?\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Every page of the repository under its own path, and what else they link to."""
    found = {file.src_uri: file for file in files if file.src_dir != config.docs_dir}
    pages = {path.relative_to(ROOT).as_posix(): path for path in _pages()}
    generated = {"docs/command-line.md": _with_commands(), "docs/python.md": _python()}
    for uri, path in pages.items():
        text = generated.pop(uri, None)
        found[uri] = _file(config, uri, path) if text is None else File.generated(config, uri, content=text)
        for linked in _linked(path):
            name = linked.relative_to(ROOT).as_posix()
            if name not in pages:
                found[name] = _file(config, name, linked)
    for uri, text in generated.items():
        found[uri] = File.generated(config, uri, content=text)
    for uri in config.extra_css:
        found[uri] = _file(config, uri, ROOT / uri)
    return Files(list(found.values()))


def _file(config: MkDocsConfig, uri: str, path: Path) -> File:
    return File.generated(config, uri, abs_src_path=str(path))


def _pages() -> Iterator[Path]:
    yield from sorted(ROOT.glob("*.md"))
    for folder in FOLDERS:
        yield from sorted((ROOT / folder).rglob("*.md"))


def _linked(page: Path) -> Iterator[Path]:
    """Files of the repository that a page links to or shows, and that are no pages."""
    for link in _LINK.findall(page.read_text(encoding="utf-8")):
        path = Path(os.path.normpath(page.parent / link))
        if "://" not in link and path.is_file() and path.is_relative_to(ROOT) and path.suffix != ".md":
            yield path


# References ----------------------------------------------------------------------------------------------------------


def _with_commands() -> str:
    """docs/command-line.md, and behind it the help of each command."""
    from typer.main import get_command
    from typer.testing import CliRunner

    from fa2gen.cli import app

    written = [(ROOT / "docs" / "command-line.md").read_text(encoding="utf-8")]
    for name, command in get_command(app).commands.items():  # type: ignore[attr-defined]
        for words in ([name], *([name, inner] for inner in getattr(command, "commands", {}))):
            environment = {"TERMINAL_WIDTH": str(WIDTH), "COLUMNS": str(WIDTH), "NO_COLOR": "1"}
            told = CliRunner().invoke(app, [*words, "--help"], prog_name="fa2gen", env=environment).output
            text = "\n".join(line.rstrip() for line in told.strip().splitlines())
            written.append(f"## fa2gen {' '.join(words)}\n\n```text\n{text}\n```\n")
    return "\n".join(written)


def _python() -> str:
    """A page of all public names: their signatures, and what their docstrings say."""
    written = ["# Python", ""]
    for name in MODULES:
        module = importlib.import_module(name)
        written += [f"## {name}", "", *_quoted(module)]
        for public in sorted(module.__all__):
            written += [f"### {public}", "", *_quoted(getattr(module, public), public)]
    return "\n".join(written)


def _quoted(thing: Any, name: str = "") -> list[str]:
    """As text: docstrings here are set in columns, which Markdown would run together."""
    says = inspect.getdoc(thing) or ""
    head = _signature(thing, name) if inspect.isfunction(thing) else ""
    return [*(["```python", head, "```", ""] if head else []), "```text", says, "```", ""]


class _Bare(str):
    """An annotation as its source has it, without quotes."""

    __repr__ = str.__str__


def _signature(function: Any, name: str) -> str:
    """On one line, or one for each parameter."""
    signature = inspect.signature(function)
    parameters = [p.replace(annotation=_Bare(p.annotation)) for p in signature.parameters.values()]
    line = f"{name}{signature.replace(parameters=parameters, return_annotation=_Bare(signature.return_annotation))}"
    if len(line) <= WIDTH:
        return line
    rows, keyword_only = [], False
    for parameter in parameters:
        if parameter.kind is parameter.KEYWORD_ONLY and not keyword_only:
            rows.append("*")
            keyword_only = True
        rows.append(str(parameter))
    inside = "".join(f"    {row},\n" for row in rows)
    return f"{name}(\n{inside}) -> {signature.return_annotation}"
