"""Seeded faults: what they are, and what a run shows of one. The tables are in the tests."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from fa2gen.cpu import KernelFault
from fa2gen.plan import make_plan
from fa2gen.render import Rendered, render
from fa2gen.spec import KernelSpec


@dataclass(frozen=True)
class Fault:
    """`old`, which is in the kernel's text `count` times, becomes `new`.

    schedules   how many it may take to see it.
    message     words of the KernelFault that it must be seen by; "" where a wrong result will do.
    time_limit  seconds of a run: few where the fault is seen by a loop that does not end.
    """

    id: str
    kernel: str
    old: str
    new: str
    schedules: int = 1
    count: int = 1
    message: str = ""
    time_limit: float = 20.0

    def __str__(self) -> str:
        """For a test's id: architecture and head dim tell the kernels of a table apart."""
        _, _, arch, _, head_dim, *_ = self.kernel.split("_")
        return f"{arch}-{head_dim}-{self.id}"


def seeded(fault: Fault) -> Rendered:
    """The kernel's CPU render with the fault in it. Line numbers keep their meaning up to the fault."""
    rendered = render(make_plan(KernelSpec.from_name(fault.kernel)), target="cpu")
    found = rendered.source.count(fault.old)
    assert found == fault.count, f"the template has changed: {fault.old!r} is there {found} times"
    return Rendered(rendered.source.replace(fault.old, fault.new), rendered.origins)


def symptom(
    run: Callable[..., tuple[Any, ...]], fault: Fault, shapes: Iterable[tuple[int, ...]], seed: int, **options: object
) -> str:
    """What a run on one of the shapes shows, or "" when nothing; `run(kernel, shape, ...)` gives the verdict first."""
    rendered = seeded(fault)
    for sizes in shapes:
        try:
            verdict, *_ = run(fault.kernel, sizes, rendered=rendered, seed=seed, time_limit=fault.time_limit, **options)
        except (KernelFault, AssertionError) as error:
            return str(error)
        if not verdict.ok:
            return str(verdict)
    return ""
