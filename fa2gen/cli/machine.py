"""The commands about this machine: `cache`, `doctor` and `shim`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fa2gen.cli.console import (
    AsJson,
    ExitStatus,
    bytes_text,
    count_text,
    examples,
    need_folder,
    note,
    print_json,
    print_pairs,
    print_table,
)

__all__ = ["app", "cache_app", "shim_app"]

app = typer.Typer(rich_markup_mode="rich", pretty_exceptions_enable=False)
cache_app = typer.Typer(
    help="The kernel cache: see, measure and empty it.",
    epilog=examples("fa2gen cache list", "fa2gen cache clear"),
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)


@cache_app.command("dir", help="Print the cache's folder.", epilog=examples("ls $(fa2gen cache dir)"))
def cache_dir() -> None:
    from fa2gen import env

    typer.echo(env.cache_dir())


@cache_app.command(
    "list",
    help="List the kernels in the cache.",
    epilog=examples("fa2gen cache list", "fa2gen cache list --json | jq length"),
)
def cache_list(as_json: AsJson = False) -> None:
    from fa2gen.store import Store

    store = Store()
    entries = store.list()
    if as_json:
        print_json([dict(entry.meta) for entry in entries])
        return
    print_table(
        ("kernel", "target", "compiler", ">registers", ">spills", ">shared memory"),
        [
            (
                entry.name,
                entry.meta["target"],
                entry.meta["compiler"],
                entry.report.registers,
                bytes_text(entry.report.spill_bytes),
                bytes_text(entry.report.shared_memory_bytes),
            )
            for entry in entries
        ],
    )
    note(f"{count_text(len(entries), 'kernel')} in {store.root}")


@cache_app.command(
    "size",
    help="Print how much the cache holds.",
    epilog=examples("fa2gen cache size", "fa2gen cache size --json"),
)
def cache_size(as_json: AsJson = False) -> None:
    from fa2gen.store import Store

    store = Store()
    kernels, size = len(store.list()), store.size()
    if as_json:
        print_json({"dir": str(store.root), "kernels": kernels, "bytes": size})
    else:
        typer.echo(f"{count_text(kernels, 'kernel')}, {bytes_text(size)}, in {store.root}")


@cache_app.command(
    "clear",
    help="Remove every kernel from the cache, with the CPU's libraries; they are compiled again when needed.",
    epilog=examples("fa2gen cache clear"),
)
def cache_clear() -> None:
    from fa2gen.store import Store

    store = Store()
    size = store.size()
    note(f"{count_text(store.clear(), 'kernel')} ({bytes_text(size)}) removed from {store.root}")


@app.command(
    help="Show what is here, and which kernels will be used.\n\nDriver, NVRTC, torch, GPU, cache, environment. Status "
    "1 when something keeps fa2gen from working.",
    epilog=examples("fa2gen doctor", "fa2gen doctor --json > doctor.json     to attach to a report"),
)
def doctor(as_json: AsJson = False) -> None:
    from fa2gen.doctor import lines, report

    found = report()
    if as_json:
        print_json(found)
    else:
        print_pairs(lines(found))
    if found["problems"]:
        raise typer.Exit(ExitStatus.FAILED)


shim_app = typer.Typer(
    help="fa2gen under the name of flash_attn, for what imports that.",
    epilog=examples("fa2gen shim wheel --out wheels", "python -m fa2gen.shim train.py --steps 100"),
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)


@shim_app.callback()
def _shim() -> None:
    """Keeps `wheel` a command of its own."""


@shim_app.command(
    help="Write a wheel named flash-attn, whose modules import fa2gen.",
    epilog=examples("fa2gen shim wheel --out wheels", "pip install wheels/flash_attn-*+fa2gen-*.whl"),
)
def wheel(out: Annotated[Path, typer.Option(help="The folder to write it to.")] = Path()) -> None:
    from fa2gen.shim.wheel import write_wheel

    need_folder("--out", out)
    typer.echo(write_wheel(out))
