"""Whatever stands in a file or a variable: a refusal that names it, or something that works. Never another exception.

By hypothesis: each file begins as fa2gen writes it, and one field, or a byte, is then something else.
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fa2gen import catalog, env, files, log, store
from fa2gen.bench import report
from fa2gen.catalog import TunedRow, read_tuned, tuned_rows
from fa2gen.errors import InvalidInput, StoreError
from fa2gen.store import read_ahead_of_time, read_entry
from fa2gen.tune import batch, record
from tests.unit.test_store import PLAN, UNIT, entry_of

hostile = settings(
    max_examples=400,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(-(10**40), 10**40),
    st.floats(),
    st.text(max_size=20),
    st.sampled_from(["../../x", "/etc/passwd", "a\0b", "", ".", "..", "\ud800", "sm_90a", "9" * 5000, PLAN.name]),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
BYTES = st.one_of(st.binary(max_size=60), st.just(b"[" * 3000), st.just(b'{"a":' * 3000), st.just(b"\xef\xbb\xbf{}"))


def places(document: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where in a JSON document something can be put, the whole among them."""
    inside = (
        document.items() if isinstance(document, dict) else enumerate(document) if isinstance(document, list) else ()
    )
    return [path, *(place for key, value in inside for place in places(value, (*path, key)))]


def with_value(document: Any, place: tuple[Any, ...], value: Any) -> Any:
    if not place:
        return value
    changed = copy.deepcopy(document)
    inner = changed
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    return changed


def spoilt(document: Any) -> st.SearchStrategy[bytes]:
    """The document as JSON with a value, a key or a byte that should not be there."""
    whole = json.dumps(document).encode()
    return st.one_of(
        st.builds(with_value, st.just(document), st.sampled_from(places(document)), VALUES).map(
            lambda changed: json.dumps(changed).encode()
        ),
        st.builds(lambda cut: whole[:cut], st.integers(0, len(whole))),
        st.builds(
            lambda at, byte: whole[:at] + bytes([byte]) + whole[at + 1 :],
            st.integers(0, len(whole)),
            st.integers(0, 255),
        ),
        BYTES,
    )


@pytest.fixture(autouse=True)
def _quiet(monkeypatch):
    monkeypatch.setattr(log, "_warned", set())


# Entries and manifests -----------------------------------------------------------------------------------------------

META = json.loads(json.dumps(entry_of().meta))


@hostile
@given(text=spoilt(META))
def test_an_entry_is_a_miss_or_as_it_was(tmp_path, text):
    folder = tmp_path / store.key_of(UNIT).folder
    if not folder.exists():
        store.write_entry(folder, entry_of())
    (folder / "meta.json").write_bytes(text)
    entry = read_entry(folder, files.own())
    if entry is not None:  # what `fa2gen cache list` prints
        assert f"{entry.name} {entry.meta['target']} {entry.report.registers:,} {entry.report.spill_bytes:,}"
        assert entry.cubin == entry_of().cubin and all(note.strip for note in entry.report.notes)
    files.is_sealed(folder)
    files.size_of_folder(folder)


MANIFEST = {
    "schema": store.SCHEMA,
    "fa2gen": store.__version__,
    "kernels": [{"folder": PLAN.name, "name": PLAN.name, "target": "sm_90a", "compiler": "13.0.88", "key": "0" * 64}],
}


@hostile
@given(text=spoilt(MANIFEST))
def test_a_manifest_is_refused_or_leads_into_its_folder(tmp_path, text):
    (tmp_path / "manifest.json").write_bytes(text)
    found = read_ahead_of_time.__wrapped__(tmp_path)
    assert found.complaint or all(folder.parent == tmp_path for folder in found.kernels.values())
    if found.complaint:
        assert not found.kernels
    for folder in found.kernels.values():
        assert read_entry(folder, files.own()) is None
    store.refusal(tmp_path)


# Tuned rows ----------------------------------------------------------------------------------------------------------

ROW = TunedRow(
    kernel="fa2_fwd_sm90_bf16_d128_m128_n80_s2_w8",
    seqlen_min=0,
    seqlen_max=4095,
    default="fa2_fwd_sm90_bf16_d128_m128_n128_s2_w8",
    runner_up="fa2_fwd_sm90_bf16_d128_m128_n64_s2_w8",
    seqlens=(512, 2048),
    tflops=(500.0, 600.0),
    tflops_default=(400.0, 500.0),
    tflops_runner_up=(450.0, 550.0),
    num_candidates=16,
    provenance={"gpu": "NVIDIA H200", "nvrtc": "13.0.88", "num_sms": 132, "complete": True},
)
FIELDS = [*TunedRow.__dataclass_fields__, "added_by_a_newer_version"]


def tuned_text(field: str, value: str) -> str:
    """A file of tuned rows with one field as given, in TOML's own words."""
    lines = [line for line in record._toml(ROW).splitlines() if not line.startswith(f"{field} =")]
    if field == "provenance":
        lines = lines[: lines.index("[row.provenance]")]
    return "\n".join(["schema = 1", lines[0], f"{field} = {value}", *lines[1:], ""])


def toml(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return json.dumps(bool(value))
    if isinstance(value, float):
        return str(value)  # nan and inf are TOML's words too
    if isinstance(value, list):
        return f"[{', '.join(map(toml, value))}]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(key)} = {toml(inner)}" for key, inner in value.items()) + "}"
    return json.dumps(value)


def takes_part(row: TunedRow) -> None:
    """All that the selector, `explain` and `list` do with a row."""
    assert row.covers(1024) in (True, False)
    assert row.range_text and row.spec.name and 0 < row.over_default < float("inf")
    assert row.refusal("NVIDIA H200") != "" and row.warning("13.0.88") != ""


@hostile
@given(field=st.sampled_from(FIELDS), value=VALUES)
def test_a_tuned_row_is_refused_by_name_or_works(tmp_path, field, value):
    path = tmp_path / "rows.toml"
    path.write_text(tuned_text(field, toml(value)), encoding="utf-8", errors="replace")
    try:
        (row,) = read_tuned(path)
    except InvalidInput as error:
        assert str(path) in str(error)
    else:
        takes_part(row)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tflops", "[-500.0, 600.0]"),
        ("tflops", "[nan, 600.0]"),
        ("tflops", '["fast", 600.0]'),
        ("tflops_default", "[0.0, 500.0]"),
        ("tflops_default", "[inf, 500.0]"),
        ("seqlen_min", "true"),
        ("seqlen_min", "-1"),
        ("seqlen_min", "5000"),
        ("seqlens", "[true, 2048]"),
        ("seqlens", "[0, 2048]"),
        ("default", '"../../x"'),
        ("runner_up", '""'),
        ("kernel", '"fa2_fwd_sm90_bf16_d129_m128_n80_s2_w8"'),
        ("num_candidates", "0"),
        ("provenance", '"H200"'),
        ("provenance", '{ gpu = 1, nvrtc = "13" }'),
        ("added_by_a_newer_version", "1"),
    ],
)
def test_a_wrong_field_is_named_with_its_file_and_row(tmp_path, field, value):
    path = tmp_path / "rows.toml"
    path.write_text(tuned_text(field, value))
    with pytest.raises(InvalidInput) as error:
        read_tuned(path)
    assert str(path) in str(error.value) and field in str(error.value) and "row " in str(error.value)


@hostile
@given(data=st.one_of(BYTES, st.builds(lambda cut: tuned_text("seqlen_min", "0").encode()[:cut], st.integers(0, 900))))
def test_a_file_of_tuned_rows_is_refused_by_name_or_works(tmp_path, data):
    path = tmp_path / "rows.toml"
    path.write_bytes(data)
    try:
        for row in read_tuned(path):
            takes_part(row)
    except InvalidInput as error:
        assert str(path) in str(error)


@pytest.fixture
def tuned(monkeypatch, tmp_path):
    """As in an installation: a cache whose tuned/ holds one good file."""
    monkeypatch.setenv("FA2GEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(catalog, "in_checkout", lambda: False)
    tmp_path.chmod(0o700)
    folder = tmp_path / "tuned"
    record.write([ROW], folder)
    tuned_rows.cache_clear()
    yield folder
    monkeypatch.undo()
    tuned_rows.cache_clear()


def is_used() -> bool:
    tuned_rows.cache_clear()
    return tuned_rows()[ROW.spec.problem, "sm90"][0] == ROW


@pytest.mark.parametrize(
    "spoil",
    [
        lambda file: file.write_text("garbage"),
        lambda file: file.write_text(tuned_text("kernel", '"fa2_')),
        lambda file: file.write_text("schema = 2"),
        lambda file: file.write_text(tuned_text("added_by_a_newer_version", "1")),
        lambda file: file.write_text("row = 7\nschema = 1"),
        lambda file: os.mkfifo(file),
        lambda file: file.mkdir(),
        lambda file: file.symlink_to("nowhere"),
        lambda file: (file.write_text(tuned_text("seqlen_min", "0")), file.chmod(0o666)),
    ],
    ids=[
        "garbage",
        "cut",
        "a newer schema",
        "a newer field",
        "no rows",
        "a pipe",
        "a folder",
        "a link",
        "for all to write",
    ],
)
def test_one_bad_file_is_passed_over_with_one_warning(tuned, caplog, spoil):
    spoil(tuned / "another.toml")
    assert is_used() and is_used()
    assert len(caplog.records) == 1 and str(tuned / "another.toml") in caplog.text


@pytest.mark.parametrize("place", ["the cache", "tuned"])
def test_rows_that_others_could_have_written_are_not_believed(tuned, caplog, place):
    assert is_used() and not caplog.records
    folder = tuned if place == "tuned" else tuned.parent
    folder.chmod(0o777)
    assert not is_used() and not is_used()
    assert len(caplog.records) == 1 and f"chmod go-w {folder}" in caplog.text


def test_nothing_is_tuned_into_a_folder_that_is_not_read(tuned):
    assert batch.default_folder() == tuned and batch.default_journal().parent.parent == tuned.parent
    tuned.chmod(0o777)
    with pytest.raises(StoreError, match="chmod go-w"):
        batch.default_folder()
    tuned.parent.chmod(0o777)
    with pytest.raises(StoreError, match="chmod go-w"):
        batch.default_journal()


# Results of bench ----------------------------------------------------------------------------------------------------

RESULT = {
    "provenance": {"gpu": "NVIDIA H200", "torch": "2.11.0", "nvrtc": "13.0.88", "matmul_8192_bf16_tflops": [700.0]},
    "rows": [
        {
            "preset": "paper",
            "direction": "fwd",
            "dtype": "bf16",
            "causal": False,
            "head_dim": 128,
            "batch": 2,
            "seqlen": 512,
            "heads": 16,
            "heads_kv": 16,
            "tflops": {"fa2gen-sm90": 500.0, "fa3": 480.0},
        }
    ],
}


@hostile
@given(text=spoilt(RESULT))
def test_a_result_is_refused_by_name_or_can_be_compared(tmp_path, text):
    path = tmp_path / "result.json"
    path.write_bytes(text)
    try:
        assert report.headlines(report.load(path)["rows"]) is not None
    except InvalidInput as error:
        assert str(path) in str(error)


def test_text_in_the_place_of_a_figure_is_named(tmp_path):
    path = tmp_path / "result.json"
    path.write_text(json.dumps(with_value(RESULT, ("rows", 0, "tflops", "fa3"), "fast")))
    with pytest.raises(InvalidInput, match=r"result\.json: row 0: tflops"):
        report.load(path)


# The environment -----------------------------------------------------------------------------------------------------

READERS: list[tuple[str, Callable[[], Any], tuple[type, ...]]] = [
    ("FA2GEN_CACHE_DIR", env.cache_dir, (Path,)),
    ("FA2GEN_AOT_DIR", env.aot_dir, (Path, type(None))),
    ("FA2GEN_SPECS", env.specs_dirs, (tuple,)),
    ("FA2GEN_DISABLE_JIT", env.disable_jit, (bool,)),
    ("FA2GEN_JOBS", env.jobs, (int,)),
    ("FA2GEN_ARCH", env.arch, (str, type(None))),
    ("FA2GEN_LOG_LEVEL", env.log_level, (str, type(None))),
]


@hostile
@given(
    reader=st.sampled_from(READERS),
    value=st.one_of(
        st.binary(max_size=30).map(lambda data: data.replace(b"\0", b"")),
        st.sampled_from(
            [b"~nobody_of_that_name/x", b"~", b"1e9", b"-1", b"\xd9\xa3", b"0x10", b"sm90 ", b"/" * 5000, b"9" * 5000]
        ),
    ),
)
def test_a_variable_is_refused_by_name_or_means_something(reader, value):
    name, read, kinds = reader
    before = os.environ.get(name)
    os.environb[name.encode()] = value
    try:
        with contextlib.suppress(InvalidInput):
            found = read()
            assert isinstance(found, kinds) and (name != "FA2GEN_JOBS" or found >= 1)
            assert not isinstance(found, Path) or found.is_absolute()
            return
        with pytest.raises(InvalidInput, match=name):
            read()
        assert any(name in problem for problem in env.problems())
    finally:
        del os.environ[name]
        if before is not None:
            os.environ[name] = before
