"""The catalogue: what specs/ says is what is built, and a mistake in a file is named with the file."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from fa2gen._paths import data_dir
from fa2gen.catalog import catalogue, read_family, written_tilings
from fa2gen.errors import InvalidInput
from fa2gen.plan import make_plan
from fa2gen.spec import KernelSpec, Problem, Tiling

SPECS = Path(data_dir("specs"))
FAMILY = """
schema = 1

[problem]
direction = "fwd"
head_dim = [64, 128]
dtype = ["fp16", "bf16"]
mask = "causal"

[[tiling]]
arch = "sm90"
tile_m = 128
tile_n = 128
num_stages = 2
num_mma_warps = 8

[[tiling]]
arch = "sm80"
tile_m = 128
tile_n = 64
num_stages = 2
num_mma_warps = 4
"""


def read(tmp_path: Path, text: str) -> list[KernelSpec]:
    path = tmp_path / "family.toml"
    path.write_text(text)
    return read_family(path)


# Reading a family ----------------------------------------------------------------------------------------------------


def test_problem_fields_expand_and_tilings_do_not(tmp_path):
    specs = read(tmp_path, FAMILY)
    assert [spec.name for spec in specs] == [
        f"fa2_fwd_{arch}_{dtype}_d{head_dim}_causal_{shape}"
        for arch, shape in (("sm90", "m128_n128_s2_w8"), ("sm80", "m128_n64_s2_w4"))
        for head_dim in (64, 128)
        for dtype in ("fp16", "bf16")
    ]


def test_a_tiling_is_never_a_product(tmp_path):
    """A list there would build kernels that nobody has measured."""
    with pytest.raises(InvalidInput, match=r"family\.toml.*\n.*tile_n"):
        read(tmp_path, FAMILY.replace("tile_n = 128", "tile_n = [64, 128]"))


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("schema = 1", "schema = 2", "schema 2|reads schema 1"),
        ("schema = 1", "", "schema None"),
        ("schema = 1", "schema = 1\nauthor = 3", "unknown table 'author'|[[tiling]]"),
        ("[problem]", "[problems]", "unknown table 'problems'"),
        ("head_dim =", "head_dims =", "head_dims|did you mean 'head_dim'"),
        ("head_dim = [64, 128]", "head_dim = 60", "head_dim|multiple of 8|nearest 64"),
        ("head_dim = [64, 128]", "head_dim = '64'", "head_dim|integer|'64'"),
        ('mask = "causal"', 'mask = "casual"', "mask|'full' or 'causal'|casual"),
        ('dtype = ["fp16", "bf16"]', 'dtype = ["fp16", "fp8"]', "dtype|fp8"),
        ("tile_m = 128", "tile_m = 100", "tile_m|multiple of 16|nearest 112"),
        ("tile_m = 128", "", "tile_m|required"),
        ("num_stages", "num_stage", "did you mean 'num_stages'"),
        ('arch = "sm90"', 'arch = "sm100"', "arch|sm80|sm90"),
        ("head_dim", "head_dim =", "family.toml"),
        ("[[tiling]]", "[tiling]", "family.toml"),
        ("[problem]", "[[problem]]", "no [problem] table"),
    ],
)
def test_a_mistake_is_named_with_its_file(tmp_path, old, new, words):
    assert old in FAMILY
    with pytest.raises(InvalidInput) as caught:
        read(tmp_path, FAMILY.replace(old, new))
    message = str(caught.value)
    assert message.startswith("family.toml: ") and all(word in message for word in words.split("|")), message


@pytest.mark.parametrize(
    "text", ["", "schema = 1", "schema = 1\n[problem]\nhead_dim = 64", "schema = 1\n[problem]\n[[tiling]]"]
)
def test_an_incomplete_family_is_refused(tmp_path, text):
    with pytest.raises(InvalidInput, match=r"family\.toml"):
        read(tmp_path, text)


def test_bytes_that_are_no_text_are_refused(tmp_path):
    path = tmp_path / "family.toml"
    path.write_bytes(b"schema = 1\n\xff\xfe")
    with pytest.raises(InvalidInput, match=r"family\.toml"):
        read_family(path)
    with pytest.raises(InvalidInput, match=r"none\.toml"):
        read_family(tmp_path / "none.toml")


# What is in specs/ ---------------------------------------------------------------------------------------------------


def test_every_kernel_of_the_catalogue_can_be_built():
    specs = catalogue()
    for spec in specs:
        make_plan(spec)
    assert len({spec.name for spec in specs}) == len(specs), "a kernel is named twice"


def test_the_catalogue_is_what_the_issue_asks_for():
    """`fa2gen build --arch sm90` builds at least 24 kernels: the usual head dims, both dtypes, both masks."""
    for arch in ("sm80", "sm90"):
        specs = catalogue(arch)
        assert all(spec.tiling.arch == arch for spec in specs)
        assert len(specs) >= 24
        problems = {spec.problem for spec in specs}
        for head_dim in (64, 128, 256):
            for dtype in ("fp16", "bf16"):
                for mask in ("full", "causal"):
                    assert Problem(head_dim=head_dim, dtype=dtype, mask=mask) in problems
    assert catalogue() == [*catalogue()] and {*catalogue("sm80"), *catalogue("sm90")} == {*catalogue()}


def test_backward_kernels_of_the_same_problems():
    """Whoever builds the catalogue can train with what it serves."""
    forward = {spec.problem for spec in catalogue("sm90") if spec.problem.direction == "fwd"}
    backward = {spec.problem for spec in catalogue("sm90") if spec.problem.direction == "bwd"}
    assert backward >= {problem.model_copy(update={"direction": "bwd"}) for problem in forward}


def test_the_first_row_of_a_problem_wins():
    first: dict[tuple[Problem, str], Tiling] = {}
    for spec in catalogue():
        first.setdefault((spec.problem, spec.tiling.arch), spec.tiling)
    assert written_tilings() == first


def test_the_caller_cannot_change_the_catalogue():
    before = len(catalogue())
    catalogue().clear()
    assert len(catalogue()) == before


@pytest.mark.parametrize("path", sorted(SPECS.glob("*.toml")), ids=lambda path: path.stem)
def test_each_row_says_why(path):
    """A tiling without its reason cannot be changed with confidence."""
    lines = path.read_text().splitlines()
    for number, line in enumerate(lines):
        if line.strip() == "[[tiling]]":
            following = lines[number : number + 1 + len(Tiling.model_fields)]
            assert lines[number - 1].startswith("#") or any("#" in row for row in following), (
                f"{path.name}:{number + 1}"
            )
    assert tomllib.loads(path.read_text())["schema"] == 1
