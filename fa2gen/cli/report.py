"""The command that shows what became of a kernel's source: `report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from fa2gen.cli.console import (
    AsJson,
    ExitStatus,
    GpuWords,
    Seqlen,
    examples,
    need_folder,
    note,
    print_json,
    print_table,
)
from fa2gen.cli.options import Asked, takes_kernels

__all__ = ["app"]

app = typer.Typer(rich_markup_mode="rich", pretty_exceptions_enable=False)

SHOWN_LINES = 12


@app.command(
    help="Show what the compiler made of each line of a kernel: machine instructions, live registers.\n\nWith --html "
    "as a page, beside the map of shared memory, resources, the selector's reason and what was measured. Needs no GPU.",
    epilog=examples(
        "fa2gen report --head-dim 128 --mask causal",
        "fa2gen report --head-dim 128 --mask causal --html --out KERNEL.html",
        "fa2gen report my.toml --html",
        "fa2gen report --head-dim 64 --html --result mine.json",
    ),
)
@takes_kernels("typical")
def report(
    asked: Asked,
    html: Annotated[bool, typer.Option("--html", help="Write a page, complete in itself.")] = False,
    out: Annotated[
        Path | None, typer.Option(help="Where to. Default: KERNEL.html in this folder.", show_default=False)
    ] = None,
    result: Annotated[
        list[Path] | None,
        typer.Option(
            help="A file of fa2gen bench --save; may be repeated. Default: those of a checkout.", show_default=False
        ),
    ] = None,
    seqlen: Seqlen = None,
    gpu: GpuWords = None,
    as_json: AsJson = False,
) -> None:
    from fa2gen.bench.report import load
    from fa2gen.explain import device_named, explain
    from fa2gen.files import write_file
    from fa2gen.plan import make_plan
    from fa2gen.report import disassembler, listing_of, page, results_here
    from fa2gen.spec import KernelSpec

    wanted = asked.wanted()
    if out is not None and not html:
        raise typer.BadParameter("--out is where a page goes: add --html")
    if out is not None and len(wanted) > 1:
        raise typer.BadParameter(f"--out is one page, and {len(wanted)} kernels are asked for: leave it out")
    for path in result or ():
        load(path)
    if html:
        need_folder("--out", out.parent if out else Path())
    rows: list[dict[str, Any]] = []
    for one in wanted:
        arch, tiling = (one.spec.tiling.arch, one.spec.tiling) if one.spec else (one.arch, None)
        found = explain(one.problem, device_named(gpu, arch), arch, seqlen, tiling)
        plan = make_plan(KernelSpec.from_name(found.kernel))
        listing = listing_of(plan, found.target)
        if html:
            path = out or Path(f"{plan.name}.html")
            try:
                write_file(path, page(listing, found, result or results_here()).encode())
            except OSError as error:
                note(f"{path} cannot be written: {error}")
                raise typer.Exit(ExitStatus.FAILED) from None
            note(f"{path}: {path.stat().st_size / 1024:,.0f} KiB")
        rows += [
            {"kernel": plan.name, "line": line.number, "instructions": len(line.instructions), "live": line.live}
            | {"template": line.origin, "text": line.text.strip()}
            for line in (listing.lines if as_json else listing.hottest(SHOWN_LINES))
        ]
    if disassembler() is None:
        note("live registers and machine instructions need nvdisasm: pip install nvidia-cuda-nvdisasm")
    if as_json:
        print_json(rows)
    elif not html:
        titles = ("kernel", ">line", ">live registers", ">instructions", "template", "text")
        keys = ("kernel", "line", "live", "instructions", "template", "text")
        print_table(titles, [tuple(row[key] for key in keys) for row in rows])
