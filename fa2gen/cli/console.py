"""What all commands share: exit status, tables that fit the terminal, notes, progress."""

from __future__ import annotations

import json
import shutil
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from enum import IntEnum
from pathlib import Path
from typing import Annotated, Any

import typer

__all__ = [
    "SECONDS_BETWEEN_LINES",
    "AsJson",
    "ExitStatus",
    "GpuWords",
    "Seqlen",
    "Seqlens",
    "bytes_text",
    "count_text",
    "examples",
    "lay_out",
    "need_folder",
    "note",
    "print_json",
    "print_pairs",
    "print_row",
    "print_table",
    "progress",
]


class ExitStatus(IntEnum):
    """What a script can tell from the exit status."""

    DONE = 0
    FAILED = 1
    USAGE = 2  # an option, a spec or a name that cannot be
    NOTHING_TO_RUN_ON = 3


LONGEST_SEQLEN = 2**31 - 1  # kernels take lengths as 32-bit integers

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document on standard output.")]
Seqlen = Annotated[
    int | None,
    typer.Option(min=1, max=LONGEST_SEQLEN, metavar="N", help="Number of keys. Default: 4096.", show_default=False),
]
GpuWords = Annotated[
    str | None,
    typer.Option(
        help="A GPU's name or words of it, e.g. h100. Default: the one here, else an H200.", show_default=False
    ),
]
Seqlens = Annotated[
    list[int] | None,
    typer.Option("--seqlen", min=1, max=LONGEST_SEQLEN, metavar="N", help="May be repeated.", show_default=False),
]


def examples(*lines: str) -> str:
    """The epilog of a command's --help."""
    return "\n".join(("[bold]Examples[/]", *lines))


# Standard output -----------------------------------------------------------------------------------------------------


def print_json(document: Any) -> None:
    typer.echo(json.dumps(document, indent=2))


def _width() -> int | None:
    """Columns of the terminal on standard output; None where that is a file or a pipe, which has no end."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def print_table(titles: Sequence[str], rows: Iterable[Iterable[Any]]) -> None:
    """A plain table; a title that begins with ">" has its column to the right. The first column is the row's name."""
    for number, line in enumerate(lay_out(titles, [[str(cell) for cell in row] for row in rows], _width())):
        typer.echo(typer.style(line, bold=True) if not number and sys.stdout.isatty() else line)


def lay_out(titles: Sequence[str], rows: Sequence[Sequence[str]], width: int | None) -> list[str]:
    """The lines of a table. Nothing is ever cut: where a table is too wide, each row is its name on a line of its own
    and below it the other cells with their titles, as many to a line as there is room for."""
    names = [title.removeprefix(">") for title in titles]
    widths = [max(len(name), *(len(row[i]) for row in rows), 0) for i, name in enumerate(names)]
    if width is None or sum(widths) + 3 * (len(widths) - 1) <= width:
        table = [
            "   ".join(
                cell.rjust(size) if title.startswith(">") else cell.ljust(size)
                for cell, title, size in zip(row, titles, widths, strict=True)
            ).rstrip()
            for row in ([*names], *rows)
        ]
        return table
    lines = [names[0]]
    for name, *cells in rows:
        pairs = [f"{title} {cell}".strip() for title, cell in zip(names[1:], cells, strict=True) if cell]
        lines += [name, *_filled(pairs, width)]
    return lines


def print_row(
    titles: Sequence[str],
    widths: tuple[int, int, int],
    row: Sequence[str],
    *,
    err: bool = False,
    bold: bool = False,
) -> None:
    """One row of a table that is printed as it comes: its first column, those between and the last have these widths.

    Where the terminal has no room for them, as `lay_out` does it.
    """
    first, between, last = widths
    width = _width()
    if width is None or first + between * (len(titles) - 2) + last <= width:
        cells = "".join(f"{cell:>{between}}" for cell in row[1:-1])
        lines = [f"{row[0]:<{first}}{cells}{row[-1]:>{last}}"]
    elif row == titles:
        lines = [row[0]]
    else:
        lines = [row[0], *_filled([f"{title} {cell}" for title, cell in zip(titles[1:], row[1:], strict=True)], width)]
    for line in lines:
        typer.echo(typer.style(line, bold=True) if bold and width else line, err=err)


def _filled(pairs: Iterable[str], width: int) -> Iterator[str]:
    line = ""
    for pair in pairs:
        if line and len(line) + 3 + len(pair) > width:
            yield line
            line = ""
        line = f"{line}   {pair}" if line else f"    {pair}"
    if line:
        yield line


def print_pairs(pairs: Iterable[tuple[str, str]]) -> None:
    """Labels with what they say; the text of a long one goes on below itself. Words are never cut."""
    found = list(pairs)
    indent = max((len(label) for label, _ in found), default=0) + 2
    width = _width()
    for label, text in found:
        head = f"{label:<{indent}}"
        if width is None or indent + len(text) <= width:
            typer.echo(f"{head}{text}".rstrip())
            continue
        for line in textwrap.wrap(
            text,
            max(width, indent + 20),
            initial_indent=head,
            subsequent_indent=" " * (indent + 2),
            break_long_words=False,
            break_on_hyphens=False,
        ):
            typer.echo(line)


def bytes_text(count: int | None) -> str:
    return "" if count is None else f"{count:,} B"


def count_text(number: int, thing: str) -> str:
    """`1 kernel`, `12 kernels`."""
    return f"{number:,} {thing}{'' if number == 1 else 's'}"


# Standard error ------------------------------------------------------------------------------------------------------


def note(text: str) -> None:
    typer.echo(text, err=True)


SECONDS_BETWEEN_LINES = 5.0


@contextmanager
def progress(verb: str, total: int) -> Iterator[Callable[[str], None]]:
    """Shows how far a command is, on standard error; the body calls what this yields once a step, with its name.

    A bar on a terminal; elsewhere a line every few seconds, also while one step takes long.
    """
    if sys.stderr.isatty():
        with _bar(verb, total) as advance:
            yield advance
        return
    done, last, started, stop = 0, "", time.monotonic(), threading.Event()

    def advance_lines(name: str) -> None:
        nonlocal done, last
        done, last = done + 1, f", {name}"

    def tell() -> None:
        while not stop.wait(SECONDS_BETWEEN_LINES):
            note(f"{verb}: {done} of {total} after {time.monotonic() - started:.0f} s{last}")

    teller = threading.Thread(target=tell, daemon=True, name="fa2gen-progress")
    teller.start()
    try:
        yield advance_lines
    finally:
        stop.set()
        teller.join()


@contextmanager
def _bar(verb: str, total: int) -> Iterator[Callable[[str], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn(verb),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=Console(stderr=True, highlight=False), transient=True) as bar:
        task = bar.add_task("", total=total)
        yield lambda name: bar.update(task, advance=1, description=name)


# Looked at before work begins ----------------------------------------------------------------------------------------


def need_folder(option: str, folder: Path) -> None:
    """Makes an option's folder, so that what cannot be written is known before work begins. Raises BadParameter."""
    import tempfile

    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise typer.BadParameter(f"{option} {folder} cannot be written: {error.strerror or error}") from None
