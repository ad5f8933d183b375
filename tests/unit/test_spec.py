"""Specs and names: one spec, one name, and nothing but a spec becomes a kernel."""

from __future__ import annotations

import copy
import pickle
import random
import re
from typing import Any, Literal, get_args, get_origin

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from fa2gen.errors import InvalidInput
from fa2gen.spec import KernelSpec, Problem, Tiling, declared
from fa2gen.testing import problems

NAME = "fa2_fwd_sm90_bf16_d128_causal_m128_n128_s2_w8"
TILING: dict[str, Any] = {"arch": "sm90", "tile_m": 128, "tile_n": 128, "num_stages": 2, "num_mma_warps": 8}
SWITCHES = [
    field for field, info in Tiling.model_fields.items() if get_origin(info.annotation) is Literal and field != "arch"
]
CUDA = '128; } extern "C" __global__ void evil() { asm("trap;");'
JINJA = "{{ cycler.__init__.__globals__.os.system('true') }}"


def random_specs(count: int) -> list[KernelSpec]:
    """Specs over all that the fields allow, feasible or not."""
    rng = random.Random(20)
    everything = problems(head_dim=range(8, 257, 8))
    return [
        KernelSpec(
            problem=rng.choice(everything),
            tiling=Tiling(
                arch=rng.choice(["sm80", "sm90"]),
                tile_m=rng.randrange(16, 257, 16),
                tile_n=rng.randrange(16, 257, 16),
                num_stages=rng.randint(1, 8),
                num_mma_warps=rng.randint(1, 16),
                **{field: rng.choice(get_args(Tiling.model_fields[field].annotation)) for field in SWITCHES},
            ),
        )
        for _ in range(count)
    ]


SPECS = random_specs(4000)


def refusal(make: Any) -> str:
    with pytest.raises(InvalidInput) as caught:
        make()
    return str(caught.value)


# Names ---------------------------------------------------------------------------------------------------------------


def test_a_name_says_everything():
    """Nobody has to look a kernel up: what a profiler shows is the whole spec."""
    for spec in SPECS:
        assert KernelSpec.from_name(spec.name) == spec


def test_different_specs_have_different_names():
    """Else two kernels would share a cache folder and a C symbol."""
    assert len({spec.name for spec in SPECS}) == len(set(SPECS)) > 3900


def test_a_name_is_a_c_symbol_and_a_folder():
    assert all(re.fullmatch(r"[a-z][a-z0-9_]{20,90}", spec.name) for spec in SPECS)


def test_a_name_is_what_the_documents_show():
    spec = KernelSpec(problem=Problem(head_dim=128, mask="causal"), tiling=Tiling(**TILING))
    assert spec.name == NAME
    narrow = KernelSpec(problem=Problem(head_dim=96, dtype="fp16"), tiling=Tiling(**TILING, swizzle_bytes=64))
    assert narrow.name == "fa2_fwd_sm90_fp16_d96_m128_n128_s2_w8_z64"
    ordered = Problem(direction="bwd", head_dim=64, mask="causal", deterministic=True)
    assert (
        KernelSpec(problem=ordered, tiling=Tiling(**TILING)).name == "fa2_bwd_sm90_bf16_d64_causal_det_m128_n128_s2_w8"
    )


def test_a_head_dim_of_v_is_said_where_it_is_another():
    """One problem has one name, whether or not somebody says that V is like Q and K."""
    assert Problem(head_dim=64, head_dim_v=64) == Problem(head_dim=64)
    spec = KernelSpec(problem=Problem(head_dim=192, head_dim_v=128, mask="causal"), tiling=Tiling(**TILING))
    assert spec.name == "fa2_fwd_sm90_bf16_d192_v128_causal_m128_n128_s2_w8"
    assert "is called 'fa2_fwd_sm90_bf16_d128_m" in refusal(
        lambda: KernelSpec.from_name("fa2_fwd_sm90_bf16_d128_v128_m128_n128_s2_w8")
    )
    assert spec.problem.text == "fwd, head dim 192, of V and O 128, bf16, causal mask"
    assert spec.problem.options == "--head-dim 192 --head-dim-v 128 --mask causal"


def test_a_forward_kernel_has_no_other_way_than_deterministic():
    for make in (
        lambda: Problem(head_dim=64, deterministic=True),
        lambda: KernelSpec.from_name(NAME.replace("_causal", "_causal_det")),
    ):
        assert re.search(r"deterministic +is for direction \"bwd\".*nearest False", refusal(make))


def edited(name: str, rng: random.Random) -> str:
    """One slip of a finger: a character deleted, doubled, replaced, or swapped with the next."""
    i = rng.randrange(len(name))
    other = rng.choice("abz0189_ -/.\n{}%;\0é")
    return rng.choice(
        [
            name[:i] + name[i + 1 :],
            name[: i + 1] + name[i:],
            name[:i] + other + name[i + 1 :],
            name[:i] + other + name[i:],
        ]
    )


def test_every_other_text_is_refused_or_is_the_name_of_what_it_gives():
    """A typing error gives an error, or another kernel by its own name: never a kernel by a second name."""
    rng = random.Random(21)
    refused = 0
    for spec in SPECS[:1500]:
        for _ in range(4):
            text = edited(spec.name, rng)
            try:
                assert KernelSpec.from_name(text).name == text
            except InvalidInput:
                refused += 1
    assert refused > 4000


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        NAME + "\n",
        " " + NAME,
        NAME.upper(),
        NAME + "_z128",  # a default spelt out
        NAME.replace("d128", "d0128"),
        NAME.replace("d128", "d\uff11\uff12\uff18"),  # digits to Python's int and to a regular expression's \d
        NAME.replace("d128", "d-128"),
        NAME.replace("d128", "d" + "9" * 5000),  # more digits than Python reads
        NAME.replace("sm90", "sm" + "9" * 5000),
        NAME.replace("_causal", "_full"),
        NAME.replace("_m128_n128", "_n128_m128"),
        NAME.replace("_s2", ""),
        NAME + "_w8",
        "../../" + NAME,
        NAME + CUDA,
        NAME.replace("bf16", JINJA),
        NAME + "\0",
        NAME.replace("fwd", "dgrad"),
        NAME.replace("sm90", "sm100"),
        NAME.replace("bf16", "fp8"),
        NAME.replace("d128", "d136x"),
        NAME.replace("d128", "d100"),
        NAME.replace("m128", "m100"),
        NAME.replace("s2", "s9"),
        NAME.replace("w8", "w0"),
        NAME + "_z48",
    ],
)
def test_other_texts_are_refused_briefly(text):
    assert len(refusal(lambda: KernelSpec.from_name(text))) < 500


def test_a_second_spelling_is_answered_with_the_first():
    assert repr(NAME) in refusal(lambda: KernelSpec.from_name(NAME.replace("s2", "s02")))


def test_a_mistyped_name_is_quoted_whole():
    assert repr(NAME + "x") in refusal(lambda: KernelSpec.from_name(NAME + "x"))


@settings(max_examples=1000, deadline=None)
@given(st.text(alphabet="fa2_bwdsm8090p16ca0123456789lt z", max_size=60) | st.text(max_size=30))
def test_any_text_is_a_name_or_refused(text):
    for name in (text, f"fa2_fwd_sm90_bf16_{text}", f"{NAME}_{text}"):
        try:
            assert KernelSpec.from_name(name).name == name
        except InvalidInput as error:
            assert len(str(error)) < 500


@settings(max_examples=1000, deadline=None)
@given(
    st.sampled_from([Problem, Tiling]),
    st.dictionaries(
        st.sampled_from([*Problem.model_fields, *Tiling.model_fields]) | st.text(max_size=8),
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.binary(max_size=4),
        max_size=3,
    ),
)
def test_any_values_are_a_spec_or_refused_by_field(model, values):
    good = {"head_dim": 64} if model is Problem else TILING
    try:
        made = model(**{**good, **values})
    except InvalidInput as error:
        assert any(repr(name)[1:-1] in str(error) or name in str(error) for name in values), error
    else:
        for name, field in declared(model).items():
            allowed = field.values or (range(field.range.least, field.range.most + 1) if field.range else ())
            assert field.is_text or (value := getattr(made, name)) in allowed or value == field.default


# Fields --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", [Problem, Tiling], ids=lambda model: model.__name__)
def test_a_misspelt_field_is_named_with_the_right_one(model):
    for field in model.model_fields:
        for wrong in (field + "s", field.replace("_", ""), field[0] + field):
            if wrong not in model.model_fields:
                good = TILING if model is Tiling else {"head_dim": 64}
                message = refusal(lambda wrong=wrong, good=good: model(**good, **{wrong: 64}))
                assert wrong in message and f"did you mean {field!r}" in message, message


def test_a_field_like_no_other_is_answered_with_all_of_them():
    message = refusal(lambda: Problem(head_dim=64, zzz=1))
    assert "zzz" in message and "direction, head_dim, head_dim_v, dtype, mask" in message


@pytest.mark.parametrize(
    ("field", "value", "nearest"),
    [
        ("head_dim", -8, 8),
        ("head_dim", 0, 8),
        ("head_dim", 7, 8),
        ("head_dim", 12, 16),
        ("head_dim", 250, 256),
        ("head_dim", 264, 256),
        ("head_dim", 10**30, 256),
        ("tile_m", 0, 16),
        ("tile_m", 100, 112),
        ("tile_n", 24, 32),
        ("tile_n", 272, 256),
        ("num_stages", 0, 1),
        ("num_stages", 9, 8),
        ("num_mma_warps", -1, 1),
        ("num_mma_warps", 17, 16),
    ],
)
def test_a_number_out_of_range_is_named_with_the_nearest_right_one(field, value, nearest):
    make = (lambda: Problem(head_dim=value)) if field == "head_dim" else (lambda: Tiling(**{**TILING, field: value}))
    message = refusal(make)
    assert field in message and f"nearest {nearest} " in message and str(value)[:9] in message, message


def test_the_nearest_number_is_a_right_one():
    for value in range(-20, 300):
        if value % 8 or not 8 <= value <= 256:
            message = refusal(lambda value=value: Problem(head_dim=value))
            nearest = int(re.search(r"nearest (\d+)", message)[1])
            assert Problem(head_dim=nearest).head_dim == nearest
            assert abs(nearest - value) <= (7 if 0 < value <= 256 else 44)


@pytest.mark.parametrize("value", [64.0, "64", None, True, [64], 64 + 0j, b"64"], ids=repr)
def test_a_number_is_a_number(value):
    """`head_dim = "64"` in a TOML file is a mistake there, not a 64."""
    assert "head_dim" in refusal(lambda: Problem(head_dim=value))


def test_everything_wrong_is_said_at_once():
    message = refusal(lambda: Tiling(arch="sm70", tile_m=100, tile_k=3, num_mma_warps=40))
    assert all(word in message for word in ("arch", "sm70", "tile_m", "tile_n", "tile_k", "num_mma_warps")), message


def test_a_part_of_a_spec_reports_as_itself():
    message = refusal(lambda: KernelSpec(problem={"head_dim": 60}, tiling=TILING))
    assert message.startswith("Problem is not valid:\n  head_dim ")
    assert "did you mean 'problem'" in refusal(lambda: KernelSpec(problme={"head_dim": 64}, tiling=TILING))


@pytest.mark.parametrize("field", ["self", "/", "", "x" * 10**6])
def test_a_field_of_any_name_is_refused(field):
    """A TOML file may hold any key."""
    assert len(refusal(lambda: Problem(**{"head_dim": 64, field: 1}))) < 500


@pytest.mark.parametrize(
    "text", [CUDA, JINJA, "full\0", "full ", "FULL", "", "{%0}", "sm90\n__device__ int x;"], ids=repr
)
def test_text_fields_are_closed_sets(text):
    """No text of a user's reaches a template: what is rendered comes from these sets and from integers."""
    for field in ("direction", "dtype", "mask"):
        message = refusal(lambda field=field: Problem(**{"head_dim": 64, field: text}))
        assert field in message and "Input should be" in message
    assert "arch" in refusal(lambda: Tiling(**{**TILING, "arch": text}))
    for field in ("tile_m", "tile_n", "num_stages", "num_mma_warps", *SWITCHES):
        assert field in refusal(lambda field=field: Tiling(**{**TILING, field: text}))


def test_an_enormous_value_gives_a_short_message():
    assert len(refusal(lambda: Problem(head_dim=64, mask="x" * 10**6))) < 500
    assert len(refusal(lambda: Problem(head_dim=10**4000))) < 500
    assert len(refusal(lambda: KernelSpec.from_name("x" * 10**6))) < 500


@pytest.mark.parametrize("field", SWITCHES)
def test_a_switch_takes_its_values_only(field):
    allowed = get_args(Tiling.model_fields[field].annotation)
    wrong: list[Any] = [value for value in (-1, 3, 48, 256) if value not in allowed]
    for value in [*wrong, None, "0", "on", 0.5, True, False, float(allowed[0])]:  # True == 1 == 1.0
        message = refusal(lambda value=value: Tiling(**{**TILING, field: value}))
        assert field in message and all(str(choice) in message for choice in allowed), message


# Values --------------------------------------------------------------------------------------------------------------


def test_specs_are_frozen():
    """A plan is cached by its spec, which must not change under it."""
    spec = KernelSpec.from_name(NAME)
    for target, field, value in (
        (spec.problem, "head_dim", 64),
        (spec.tiling, "tile_m", 64),
        (spec, "tiling", spec.tiling),
    ):
        with pytest.raises(ValidationError, match="frozen"):
            setattr(target, field, value)
    assert spec.name == NAME


def test_equal_specs_are_one_key():
    first, second = KernelSpec.from_name(NAME), KernelSpec.from_name(NAME)
    assert first == second and hash(first) == hash(second) and {first: 1}[second] == 1
    assert copy.deepcopy(first) == pickle.loads(pickle.dumps(first)) == first


# What the fields declare ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", [Problem, Tiling], ids=lambda model: model.__name__)
def test_every_field_says_what_it_is(model):
    """Command line, names, sentences and the schema of spec files have no other source."""
    for name, field in declared(model).items():
        assert field.help.endswith("."), name
        assert [bool(field.values), bool(field.range), field.is_text].count(True) == 1, name
        assert field.default is None or field.default in (field.values or [field.default])


def test_no_two_fields_read_alike_in_a_name():
    """Else a name could be read in two ways."""
    fields = [field for model in (Problem, Tiling) for field in declared(model).values()]
    for field in fields:
        if field.is_text:
            continue
        values = field.values or range(field.range.least, field.range.most + 1, field.range.step)
        for word in filter(None, map(field.word, values)):
            assert [other.name for other in fields if other.value_of(word) is not None] == [field.name], word


def test_a_sentence_says_every_field():
    problem = Problem(direction="bwd", head_dim=96, dtype="fp16", mask="causal", deterministic=True)
    assert problem.text == "bwd, head dim 96, fp16, causal mask, deterministic"
    assert Problem(head_dim=96).text == "fwd, head dim 96, bf16, full mask"
    assert Tiling(**TILING, lazy_rescale=1).text == (
        "sm90, 128 query rows, 128 keys, 2 stages, 8 mma warps, 128-byte panels, lazy rescale"
    )
    assert problem.words == ("bwd", "fp16", "d96", "causal", "det")
    assert len({spec.problem.text for spec in SPECS}) == len({spec.problem for spec in SPECS})


def test_a_row_has_every_field_of_the_problem():
    row = KernelSpec.from_name(NAME).row()
    assert row["name"] == NAME and row["arch"] == "sm90" and row.keys() >= Problem.model_fields.keys()
