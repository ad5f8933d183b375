"""The probes of tests/probes/ compile for a GPU: what the host shows of them can be asked of a device."""

from __future__ import annotations

import struct
from dataclasses import replace

import pytest
from machine_probes import Probe, probes

from fa2gen.compile import compile_unit


def cases() -> list[pytest.param]:
    """Each text once: the probes of boxes differ in their data only."""
    found = {}
    for probe in probes():
        for target in probe.targets:
            found.setdefault(
                (probe.unit(target).source, target), pytest.param(probe, target, id=f"{probe.name}-{target}")
            )
    return list(found.values())


@pytest.mark.parametrize(("probe", "target"), cases())
def test_probe(probe: Probe, target: str) -> None:
    unit = probe.unit(target)
    size = struct.calcsize(probe.params_format)  # what tests/gpu packs
    report = compile_unit(
        replace(unit, source=f"{unit.source}static_assert(sizeof(fa2gen::probe::Params) == {size});\n")
    ).report
    # A probe uses a part of what the files of templates/ptx/ define.
    notes = [note for note in report.notes if "was declared but never referenced" not in note]
    assert not notes and not report.spill_bytes
