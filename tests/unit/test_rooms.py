"""templates/rooms: the blocks of a room define what the table in templates/README.md says, no other is called."""

from __future__ import annotations

import re
from fnmatch import fnmatch
from itertools import pairwise
from pathlib import Path

import pytest

TEMPLATES = Path(__file__).resolve().parents[2] / "templates"
BLOCKS = sorted(path.relative_to(TEMPLATES).as_posix() for path in (TEMPLATES / "rooms").rglob("*.j2"))
DEFINITION = re.compile(r"__device__ __forceinline__ (\w+) (\w+)\(((?:[^()]|\([^()]*\))*)\)")


def plain(parameter: str) -> str:
    """`float[2]` of `float const (&row_max)[2]`; the name, const and & are left out."""
    words = re.sub(r"\bconst\b|[&()]", "", parameter)
    kind, before, behind = re.fullmatch(r"\s*(\w+)(\[\d+\])?\s*\w*\s*(\[\d+\])?\s*", words).groups()
    return kind + (before or behind or "")


def signature(result: str, name: str, parameters: str) -> str:
    return f"{result} {name}({', '.join(map(plain, filter(None, parameters.split(','))))})"


def defined(block: str) -> set[str]:
    """Signatures of what a block defines."""
    text = re.sub(r"\{#.*?#\}|\{\{.*?\}\}", "", (TEMPLATES / block).read_text(), flags=re.S)
    return {signature(*found) for found in DEFINITION.findall(" ".join(text.split()))}


def table() -> list[tuple[list[str], str]]:
    """(patterns of blocks, signature) of each row."""
    text = (TEMPLATES / "README.md").read_text()
    (section,) = re.findall(r"## Rooms\n(.*?)\n## ", text, flags=re.S)
    rows, blocks = [], []
    for first, second in re.findall(r"^\|([^|]*)\| `([^`|]+)` \|", section, flags=re.M):
        blocks = re.findall(r"`([^`]+)`", first) or blocks
        rows.append((blocks, signature(*re.fullmatch(r"(\w+) (\w+)\((.*)\)", second).groups())))
    return rows


def wanted(block: str) -> set[str]:
    name = block.removeprefix("rooms/").removesuffix(".cuh.j2")
    return {of for patterns, of in table() if any(fnmatch(name, pattern) for pattern in patterns)}


def test_the_table_is_read_whole():
    rows = table()
    assert len(rows) > 25 and all(a != b for a, b in pairwise(rows))
    used = {pattern for patterns, _ in rows for pattern in patterns}
    names = [block.removeprefix("rooms/").removesuffix(".cuh.j2") for block in BLOCKS]
    assert not [pattern for pattern in used if not any(fnmatch(name, pattern) for name in names)]


@pytest.mark.parametrize("block", BLOCKS)
def test_a_block_defines_what_its_room_says(block):
    missing = wanted(block) - defined(block)
    assert wanted(block) and not missing, f"{block} defines {defined(block)}"
    own = {of.split()[1].split("(")[0] for of in defined(block) - wanted(block)}
    others = [path for path in TEMPLATES.rglob("*.j2") if path != TEMPLATES / block]
    named = {name: [p.name for p in others if re.search(rf"\b{name}\(", p.read_text())] for name in own}
    assert not any(named.values()), f"templates/README.md does not say what others call: {named}"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Params const& p", "Params"),
        ("int", "int"),
        ("float const (&row_max)[2]", "float[2]"),
        ("float[2] lse", "float[2]"),
        ("int64_t row_stride", "int64_t"),
    ],
)
def test_parameters_are_read(text, expected):
    assert plain(text) == expected
