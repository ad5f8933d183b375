"""The catalogue: what specs/ says is what is built, and a mistake in a file is named with the file."""

from __future__ import annotations

import json
import os
import re
import tomllib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fa2gen import catalog
from fa2gen._paths import data_dir
from fa2gen.arch import ARCHES
from fa2gen.catalog import (
    MAX_KERNELS,
    Wanted,
    catalogue,
    parse_spec,
    read_spec,
    spec_schema,
    users_tilings,
    written_tilings,
)
from fa2gen.errors import InvalidInput
from fa2gen.plan import default_tiling, make_plan
from fa2gen.spec import KernelSpec, Problem, Tiling, declared

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

GOOD_TILING = {"arch": "sm90", "tile_m": 128, "tile_n": 128, "num_mma_warps": 8}


def read(tmp_path: Path, text: str) -> list[Wanted]:
    path = tmp_path / "family.toml"
    path.write_text(text)
    return read_spec(path)


def error_of(data: str | bytes) -> str:
    with pytest.raises(InvalidInput) as caught:
        parse_spec(data if isinstance(data, bytes) else data.encode(), "family.toml")
    return str(caught.value)


# Reading a family ----------------------------------------------------------------------------------------------------


def test_problem_fields_expand_and_tilings_do_not(tmp_path):
    specs = read(tmp_path, FAMILY)
    assert [KernelSpec(problem=problem, tiling=tiling).name for problem, tiling in specs] == [
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
        ("schema = 1", "schema = 2", "schema 2|schema = 1"),
        ("schema = 1", "", "no schema|schema = 1"),
        ("schema = 1", "schema = 1\nauthor = 3", "unknown table 'author'|[[tiling]]"),
        ("[problem]", "[problems]", "unknown table 'problems'"),
        ("schema = 1", "schema = 1\nnum_stages = 2", "num_stages stands outside of [[tiling]]"),
        ("schema = 1", "schema = 1\nmask = 'full'", "mask stands outside of [problem]"),
        ("head_dim =", "head_dims =", "head_dims|did you mean 'head_dim'"),
        ("head_dim = [64, 128]", "head_dim = 60", "head_dim|multiple of 8|nearest 64"),
        ("head_dim = [64, 128]", "head_dim = '64'", "head_dim|integer|'64'"),
        ('mask = "causal"', 'mask = "casual"', "mask|'full'|'causal'|casual"),
        ('dtype = ["fp16", "bf16"]', 'dtype = ["fp16", "fp8"]', "dtype|fp8"),
        ("tile_m = 128", "tile_m = 100", "tile_m|multiple of 16|nearest 112"),
        ("tile_m = 128", "", "tile_m|required"),
        ("num_stages", "num_stage", "did you mean 'num_stages'"),
        ('arch = "sm90"', 'arch = "sm100"', "arch|sm80|sm90"),
        ("head_dim", "head_dim =", "family.toml"),
        ("[[tiling]]", "[tiling]", "family.toml"),
        ("[problem]", "[[problem]]", "no [problem] table|[[problem]] is a list"),
    ],
)
def test_a_mistake_is_named_with_its_file(tmp_path, old, new, words):
    assert old in FAMILY
    with pytest.raises(InvalidInput) as caught:
        read(tmp_path, FAMILY.replace(old, new))
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / 'family.toml'}: ") and all(word in message for word in words.split("|"))


@pytest.mark.parametrize("text", ["", "schema = 1", "schema = 1\n[problem]", "schema = 1\n[[tiling]]"])
def test_an_incomplete_family_is_refused(text):
    assert error_of(text).startswith("family.toml: ")


def test_one_table_of_a_tiling_is_told_from_rows():
    assert "write [[tiling]]" in error_of("schema = 1\n[problem]\nhead_dim = 64\n[tiling]\ntile_m = 64")


def test_without_a_tiling_how_is_left_open():
    wanted = parse_spec(b"schema = 1\n[problem]\nhead_dim = [64, 72]", "family.toml")
    assert wanted == [Wanted(Problem(head_dim=64), None), Wanted(Problem(head_dim=72), None)]


def test_bytes_that_are_no_text_are_refused(tmp_path):
    assert error_of(b"schema = 1\n\xff\xfe").startswith("family.toml: ")
    for path in (tmp_path / "none.toml", tmp_path, Path("a\0b.toml")):
        with pytest.raises(InvalidInput, match=re.escape(repr(str(path))[1:-1]) + "|null"):
            read_spec(path)


MINIMAL = "schema = 1\n[problem]\nhead_dim = 64\n"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (MINIMAL + "self = 1", "self|unknown field"),
        (MINIMAL + "[[tiling]]\nself = 1", "self|unknown field"),
        ("x = " + "[" * 3000, "nested too deeply"),
        ("x = " + "9" * 5000, "digits"),
        ("#" * (2 << 20), "more than 1,048,576 bytes"),
        ("schema = true\n[problem]\nhead_dim = 64", "schema True"),
        ("schema = 1.0\n[problem]\nhead_dim = 64", "schema 1.0"),
        (MINIMAL.replace("64", "[]"), "head_dim|empty list"),
        (MINIMAL.replace("64", "[[64]]"), "head_dim|[64]"),
        (MINIMAL.replace("64", str([64] * 1000)) + f"dtype = {['bf16'] * 1000}", "1,000,000 kernels|head_dim"),
        (MINIMAL + "[[tiling]]\n" * (MAX_KERNELS + 1), "4,097 kernels"),
        (FAMILY + "lazy_rescale = true", "lazy_rescale|0 or 1"),
        (FAMILY.replace("num_stages = 2", "num_stages = 2.0"), "num_stages|integer"),
        (MINIMAL + "deterministic = 1", "deterministic|boolean"),
        (MINIMAL + "deterministic = true", 'deterministic|is for direction "bwd"'),
        ("schema = 1\n" + "k" * 10**5 + " = 1", "unknown table"),
        (MINIMAL + "k" * 10**5 + " = 1", "unknown field"),
    ],
    ids=lambda value: value[:40],
)
def test_a_hostile_file_is_refused_briefly(text, words):
    message = error_of(text)
    assert message.startswith("family.toml: ") and len(message) < 600
    assert all(word in message for word in words.split("|")), message


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.sampled_from([8, 16, 64, 128, 256, 1, 0])
    | st.floats()
    | st.sampled_from(["fwd", "bwd", "fp16", "bf16", "full", "causal", "sm80", "sm90"])
    | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=2),
    max_leaves=4,
)
KEYS = st.sampled_from([*Problem.model_fields, *Tiling.model_fields, "self", "schema"]) | st.text(max_size=8)
TABLES = st.dictionaries(KEYS, VALUES, max_size=4)


def toml(value: object) -> str:
    """TOML of a value, or what looks like it."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(key)} = {toml(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(toml, value)) + "]"
    return json.dumps(value)


@settings(max_examples=1000, deadline=None)
@given(
    TABLES, st.none() | st.lists(st.builds(lambda extra: {**GOOD_TILING, **extra}, TABLES), max_size=2), st.booleans()
)
def test_any_tables_are_kernels_or_an_error_that_names_the_file(problem, tilings, good):
    text = f"schema = 1\nproblem = {toml({'head_dim': 64, **problem} if good else problem)}\n"
    text += f"tiling = {toml(tilings)}\n" if tilings is not None else ""
    try:
        wanted = parse_spec(text.encode(), "family.toml")
    except InvalidInput as error:
        assert str(error).startswith("family.toml: ")
    else:
        assert wanted and all(KernelSpec.from_name(spec.name) == spec for spec in specs_of(wanted))


def specs_of(wanted: list[Wanted]) -> list[KernelSpec]:
    return [KernelSpec(problem=problem, tiling=tiling or Tiling(**GOOD_TILING)) for problem, tiling in wanted]


@settings(max_examples=500, deadline=None)
@given(st.binary(max_size=60) | st.text(max_size=60).map(str.encode))
def test_any_bytes_are_refused(data):
    for whole in (data, FAMILY.encode() + data, data + FAMILY.encode()):
        try:
            parse_spec(whole, "family.toml")
        except InvalidInput as error:
            assert str(error).startswith("family.toml: ")


def test_the_schema_knows_what_the_reader_knows():
    """Editors complete by it: every field with its values, its range and what it means."""
    schema = spec_schema()
    problem, tiling = schema["properties"]["problem"], schema["properties"]["tiling"]["items"]
    for model, found in ((Problem, problem), (Tiling, tiling)):
        assert not found["additionalProperties"]
        for name, field in declared(model).items():
            rule = found["properties"][name]
            assert rule["description"] == field.help
            assert (name in found["required"]) == model.model_fields[name].is_required()
            one, *many = rule["anyOf"] if model is Problem else (rule,)
            assert [item["items"] for item in many] == ([one] if model is Problem else [])
            if field.range:
                limits = (one["multipleOf"], one["minimum"], one["maximum"])
                assert limits == (field.range.step, field.range.least, field.range.most)
            elif field.values:
                assert one.get("enum", [False, True]) == [*field.values]
    json.dumps(schema, allow_nan=False)


# A user's own specs ---------------------------------------------------------------------------------------------------


@pytest.fixture
def users(monkeypatch, tmp_path):
    """An empty folder in FA2GEN_SPECS; what was read before is forgotten, then and afterwards."""
    from fa2gen.select import forget as forget_selections

    def forget() -> None:
        for cached in (
            catalog._catalogue,
            catalog._written,
            written_tilings,
            users_tilings,
            catalog.tuned_rows,
        ):
            cached.cache_clear()
        forget_selections()

    folder = tmp_path / "mine"
    folder.mkdir()
    with monkeypatch.context() as patch:
        patch.setenv("FA2GEN_SPECS", str(folder))
        forget()
        yield folder
    forget()


def test_a_users_tiling_comes_first(users):
    from fa2gen.explain import KNOWN_DEVICES
    from fa2gen.select import best_spec, select

    tiling = Tiling(arch="sm90", tile_m=128, tile_n=48, num_stages=3, num_mma_warps=8)
    text = "".join(f"{name} = {json.dumps(value)}\n" for name, value in tiling.model_dump().items())
    (users / "own.toml").write_text(f"schema = 1\n[problem]\nhead_dim = [128, 24]\n[[tiling]]\n{text}")
    for head_dim in (128, 24):
        problem = Problem(head_dim=head_dim)
        selection = select(problem, KNOWN_DEVICES[0])
        assert selection.plan.tiling == best_spec(problem, "sm90").tiling == tiling
        assert "FA2GEN_SPECS" in selection.reason
        assert KernelSpec(problem=problem, tiling=tiling) in catalogue("sm90")
        assert select(problem, KNOWN_DEVICES[2]).plan.tiling != tiling  # an A100's kernels are of the other family
    assert select(Problem(head_dim=128, mask="causal"), KNOWN_DEVICES[0]).plan.tiling != tiling


def test_a_users_tuned_rows_come_before_the_shipped(users):
    from fa2gen.explain import KNOWN_DEVICES
    from fa2gen.select import select

    shipped = next(row for row in catalog.read_tuned(SPECS / "tuned" / "nvidia-h200-sm90-fwd-d80.toml"))
    spec = shipped.spec
    own = KernelSpec(problem=spec.problem, tiling=spec.tiling.model_copy(update={"tile_n": 48}))
    (users / "tuned").mkdir()
    text = (SPECS / "tuned" / "nvidia-h200-sm90-fwd-d80.toml").read_text()
    (users / "tuned" / "a.toml").write_text(text.replace(f'"{spec.name}"', f'"{own.name}"'))
    catalog.tuned_rows.cache_clear()
    seqlen = max(1, shipped.seqlen_min)
    assert select(spec.problem, KNOWN_DEVICES[0], None, seqlen).plan.spec == own


def test_a_problem_without_a_tiling_is_built_for_every_family(users):
    (users / "own.toml").write_text("schema = 1\n[problem]\nhead_dim = 24")
    found = [spec for spec in catalogue() if spec.problem == Problem(head_dim=24)]
    assert [spec.tiling for spec in found] == [default_tiling(Problem(head_dim=24), arch) for arch in ARCHES]
    assert users_tilings() == {}


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_what_is_no_file_in_a_folder_is_named(users, make):
    """A pipe is not waited for."""
    make(users / "own.toml")
    with pytest.raises(InvalidInput, match=r"own\.toml: it is no regular file"):
        catalogue()


def test_a_folder_that_is_none_is_named(users):
    users.rmdir()
    with pytest.raises(InvalidInput, match=r"FA2GEN_SPECS names .*mine"):
        catalogue()


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


def test_a_tiling_is_written_only_where_the_default_is_another():
    """What specs/ repeats of the defaults is a second list of them, which the first then leaves behind."""
    written = written_tilings()
    assert written and not [key for key, tiling in written.items() if default_tiling(*key) == tiling]
    served = {(spec.problem, spec.tiling.arch): spec.tiling for spec in catalogue()}
    assert len(served) == len(catalogue()), "two kernels for one problem"
    assert (
        all(served[key] == written.get(key, default_tiling(*key)) for key in served) and written.keys() <= served.keys()
    )


def test_a_problem_left_open_has_what_another_spec_writes(users):
    """In FA2GEN_SPECS as in specs/, whatever the files' order."""
    (users / "a.toml").write_text("schema = 1\n[problem]\nhead_dim = 24\n")
    row = "arch = 'sm80'\ntile_m = 64\ntile_n = 32\nnum_stages = 1\nnum_mma_warps = 4\n"
    (users / "b.toml").write_text(f"schema = 1\n[problem]\nhead_dim = 24\n[[tiling]]\n{row}")
    mine = [spec.name for spec in catalogue() if spec.problem.head_dim == 24]
    assert [name for name in mine if "sm80" in name] == ["fa2_fwd_sm80_bf16_d24_m64_n32_s1_w4"] and len(mine) == 2


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
