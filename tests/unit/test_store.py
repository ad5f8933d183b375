"""The kernel cache under attack: racing, killed and stuck processes, damaged entries, full disks, other users.

Nothing is compiled here: `compile_unit` is replaced by one that returns a small ELF file and writes down that it was
asked. Other processes run this very file as a script (see the end), so that they start with few imports.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import resource
import signal
import stat
import struct
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from fa2gen import __version__, files, log, store
from fa2gen.compile import OPTIONS, Compiled, ResourceReport, Unit, cubin_is_whole, launch_facts
from fa2gen.errors import CompileError, StoreError
from fa2gen.files import TEMPORARY
from fa2gen.store import Entry, Store, key_of, read_entry, write_entry, write_manifest

FILES = ("kernel.cu", "kernel.cubin", "meta.json")


def elf(payload: bytes) -> bytes:
    """The smallest file that passes for a cubin: a header, one section, the section table."""
    header = struct.pack(
        "<6s10x2HI3QI6H", b"\x7fELF\x02\x01", 2, 190, 1, 0, 0, 64 + len(payload), 0, 64, 56, 0, 64, 2, 0
    )
    return header + payload + bytes(64) + struct.pack("<4xI16x2Q24x", 1, 64, len(payload))


@dataclass(frozen=True)
class Plan:
    """As much of a KernelPlan as the store looks at."""

    name: str = "fa2_fwd_sm90_bf16_d128_m128_n128_s2_w8"
    arch: str = "sm90"
    target: str = "sm_90a"
    head_dim: int = 128
    head_dim_v: int = 128
    num_threads: int = 384
    shared_memory_bytes: int = 200_000
    params: tuple[Any, ...] = ()
    tensor_maps: tuple[Any, ...] = ()
    entry_points: tuple[Any, ...] = ()


PLAN: Any = Plan()
UNIT = Unit(PLAN.name, "// a kernel\n" * 100, PLAN.target, launch_facts(PLAN))


def compile_quietly(unit: Unit) -> Compiled:
    report = ResourceReport(168, 0, 0, 0, unit.launch["shared_memory_bytes"], 0.5, ("a note",))
    return Compiled(unit.name, unit.source, elf(unit.source.encode()), report)


def entry_of(unit: Unit = UNIT) -> Entry:
    compiled = compile_quietly(unit)
    return store._make_entry(unit, key_of(unit), compiled.cubin, compiled.report)


@pytest.fixture(autouse=True)
def asked(monkeypatch):
    """The units that were compiled. Also forgets what earlier tests warned of, and keeps the environment out."""
    units: list[Unit] = []

    def compile_unit(unit: Unit) -> Compiled:
        units.append(unit)
        return compile_quietly(unit)

    monkeypatch.setattr(store, "compile_unit", compile_unit)
    monkeypatch.setattr(store, "plan_unit", lambda plan, target: replace(UNIT, target=target))
    monkeypatch.setattr(log, "_warned", set())
    for name in ("FA2GEN_AOT_DIR", "FA2GEN_DISABLE_JIT"):
        monkeypatch.delenv(name, raising=False)
    store.read_ahead_of_time.cache_clear()
    return units


@pytest.fixture
def root(tmp_path):
    return tmp_path / "cache"


def warnings(caplog) -> list[str]:
    return [record.message for record in caplog.records if record.levelno >= logging.WARNING]


def leftovers(root: Path) -> list[str]:
    return [path.name for path in root.iterdir() if path.name.startswith(TEMPORARY)]


# What a store does when nobody attacks it ----------------------------------------------------------------------------


def test_a_second_store_finds_what_the_first_compiled(root, asked):
    cold, warm = Store(root).compile_once(UNIT), Store(root).compile_once(UNIT)
    assert asked == [UNIT]
    assert warm == cold
    assert (warm.source, warm.report.notes) == (UNIT.source, ("a note",))


def test_an_entry_can_be_read_by_a_person(root):
    Store(root).compile_once(UNIT)
    folder = root / key_of(UNIT).folder
    assert folder.name == f"{PLAN.name}-{key_of(UNIT).digest[:16]}"
    assert sorted(path.name for path in folder.iterdir()) == sorted(FILES)
    assert (folder / "kernel.cu").read_text() == UNIT.source
    meta = json.loads((folder / "meta.json").read_text())
    assert (meta["name"], meta["target"], meta["fa2gen"]) == (PLAN.name, "sm_90a", __version__)
    assert meta["launch"]["num_threads"] == 384
    assert meta["report"]["registers"] == 168
    assert stat.S_IMODE(root.stat().st_mode) == stat.S_IMODE(folder.stat().st_mode) == 0o700


@pytest.mark.parametrize(
    "change",
    [
        {"source": UNIT.source + " "},
        {"target": "sm_90"},
        {"name": "another"},
        {"launch": {**UNIT.launch, "shared_memory_bytes": 1}},
    ],
    ids=lambda change: next(iter(change)),
)
def test_every_input_of_the_compiler_is_in_the_key(change):
    assert key_of(replace(UNIT, **change)).digest != key_of(UNIT).digest


def test_options_and_the_exact_compiler_are_in_the_key(monkeypatch):
    digests = {key_of(UNIT).digest}
    monkeypatch.setattr(store, "OPTIONS", {**OPTIONS, "lineinfo": False})
    digests.add(key_of(UNIT).digest)
    monkeypatch.setattr(store, "compiler_version", lambda: "13.0.89")
    digests.add(key_of(UNIT).digest)
    assert len(digests) == 3


def test_where_a_line_came_from_is_not_in_the_key():
    assert key_of(replace(UNIT, origins=("a.j2:1",))) == key_of(UNIT)


def test_a_cold_compile_logs_one_line_and_a_hit_none(root, caplog):
    caplog.set_level(logging.INFO, "fa2gen")
    Store(root).compile_once(UNIT)
    assert [record.message for record in caplog.records] == [f"compiled {PLAN.name} for sm_90a in 0.50 s"]
    Store(root).compile_once(UNIT)
    assert len(caplog.records) == 1


def test_list_size_and_clear_touch_only_entries(root):
    cache = Store(root)
    cache.compile_once(UNIT)
    cache.compile_once(replace(UNIT, name="another"))
    library = {"kernel.so": b"ELF"}
    meta = {"fa2gen": __version__, "sha256": files.seal(library)}
    files.write_folder(root / "cpu" / f"machine-{'0' * 16}", library, meta, mode=0o700)
    for stranger in ("thesis-0123456789abcdef/thesis.tex", ".tmp-backup/x", "plain/x", "cpu/thesis-0123456789abcdef/x"):
        (root / stranger).parent.mkdir()
        (root / stranger).write_text("years of work")
    (root / key_of(UNIT).folder / "notes").write_text("years of work")
    os.utime(root / ".tmp-backup", (0, 0))
    assert [entry.name for entry in cache.list()] == ["another", PLAN.name]
    kept = [*root.glob("*-*/kernel.*"), *root.glob("cpu/machine-*/kernel.so"), *root.glob("**/meta.json")]
    assert cache.size() == sum(file.stat().st_size for file in kept) > 0
    assert cache.clear() == 3
    assert (cache.list(), cache.size(), cache.clear()) == ((), 0, 0)
    cache.compile_once(UNIT)  # which sweeps what killed writers left
    assert len([path for path in root.rglob("*") if path.is_file() and path.read_text() == "years of work"]) == 5
    assert not (root / "cpu" / f"machine-{'0' * 16}").exists()


def test_a_cache_that_cannot_be_cleared_is_an_error(root, monkeypatch):
    cache = Store(root)
    cache.compile_once(UNIT)
    cache.compile_once(replace(UNIT, name="another"))
    monkeypatch.setattr(os, "unlink", failing(errno.EROFS))
    with pytest.raises(StoreError, match=f"2 of 2 kernels could not be removed from {root}"):
        cache.clear()
    monkeypatch.undo()
    assert len(cache.list()) == 2


def test_looking_makes_nothing(root):
    cache = Store(root)
    assert (cache.list(), cache.size(), cache.clear(), cache.try_load(key_of(UNIT))) == ((), 0, 0, None)
    assert not root.exists()


def test_threads_compile_a_key_once(root, monkeypatch, asked):
    slowly(monkeypatch)
    cache = Store(root)
    with ThreadPoolExecutor(8) as pool:
        entries = [*pool.map(cache.compile_once, [UNIT] * 8)]
    assert len(asked) == 1 and len({entry.cubin for entry in entries}) == 1


def slowly(monkeypatch):
    def compile_slowly(unit):
        time.sleep(0.2)
        return compile_unit(unit)

    compile_unit = vars(store)["compile_unit"]
    monkeypatch.setattr(store, "compile_unit", compile_slowly)


def test_a_failed_compilation_leaves_the_key_free(root, monkeypatch):
    def fail(unit: Unit) -> Compiled:
        raise CompileError("no")

    cache = Store(root)
    with monkeypatch.context() as patch:
        patch.setattr(store, "compile_unit", fail)
        with pytest.raises(CompileError):
            cache.compile_once(UNIT)
    assert cache.compile_once(UNIT)


# Damaged entries -----------------------------------------------------------------------------------------------------


def heals(root: Path, asked: list[Unit]) -> None:
    """What is at the entry's place is a miss that is compiled over, once."""
    assert Store(root).try_load(key_of(UNIT)) is None
    before = len(asked)
    assert Store(root).compile_once(UNIT).source == UNIT.source
    assert len(asked) == before + 1
    assert Store(root).try_load(key_of(UNIT)) == entry_of()
    assert not leftovers(root)


@pytest.mark.parametrize("name", FILES)
def test_no_truncation_is_taken_for_an_entry(root, name, asked):
    Store(root).compile_once(UNIT)
    file = root / key_of(UNIT).folder / name
    whole = file.read_bytes()
    ends = len(whole) - (name == "meta.json")  # its last byte is a line feed, and says nothing
    for length in {*range(0, ends, 97), *range(min(70, ends)), *range(ends - 70, ends)}:
        file.write_bytes(whole[:length])
        assert read_entry(file.parent) is None, length
    heals(root, asked)


def test_no_flipped_bit_of_a_cubin_is_taken_for_an_entry(root, asked):
    Store(root).compile_once(UNIT)
    file = root / key_of(UNIT).folder / "kernel.cubin"
    whole = file.read_bytes()
    for place in range(0, len(whole), 131):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        assert read_entry(file.parent) is None, place
    heals(root, asked)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("how", ["missing", "a folder", "a dangling link", "a pipe", "huge", "writable by others"])
def test_an_unreadable_file_is_a_miss(root, name, how, asked):
    Store(root).compile_once(UNIT)
    file = root / key_of(UNIT).folder / name
    if how == "writable by others":
        file.chmod(0o666)
    else:
        file.unlink()
    if how == "a folder":
        file.mkdir()
    elif how == "a pipe":
        os.mkfifo(file)
    elif how == "huge":
        with file.open("wb") as sparse:
            sparse.truncate(1 << 30)
    elif how == "a dangling link":
        file.symlink_to("nowhere")
    heals(root, asked)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "null",
        "[]",
        "{}",
        "7",
        '"text"',
        "[" * 100_000,
        "\x00\xff",
        '{"schema": 1}',
        '{"schema": 1, "sha256": null}',
    ],
    ids=range(10),
)
def test_foreign_json_is_a_miss(root, text, asked):
    Store(root).compile_once(UNIT)
    (root / key_of(UNIT).folder / "meta.json").write_text(text)
    heals(root, asked)


@pytest.mark.parametrize(
    "change",
    [
        {"schema": store.SCHEMA + 1},
        {"key": "0" * 64},
        {"report": {"registers": 1}},
        {"report": None},
        {"report": {**asdict(compile_quietly(UNIT).report), "registers": "many"}},
        {"report": {**asdict(compile_quietly(UNIT).report), "notes": [None]}},
        {"launch": ...},
        {"launch": "text"},
        {"name": ["text"]},
    ],
    ids=str,
)
def test_an_entry_of_another_kind_is_a_miss(root, change, asked):
    Store(root).compile_once(UNIT)
    meta = {key: value for key, value in {**entry_of().meta, **change}.items() if value is not ...}
    (root / key_of(UNIT).folder / "meta.json").write_text(json.dumps(meta))
    heals(root, asked)


def test_right_digests_do_not_make_a_cubin(root, asked):
    Store(root).compile_once(UNIT)
    write_foreign = store._make_entry(UNIT, key_of(UNIT), b"not an ELF file", entry_of().report)
    folder = root / key_of(UNIT).folder
    (folder / "kernel.cubin").write_bytes(write_foreign.cubin)
    (folder / "meta.json").write_text(json.dumps(write_foreign.meta))
    heals(root, asked)


def test_an_empty_folder_in_the_place_of_an_entry_is_replaced(root, asked):
    (root / key_of(UNIT).folder).mkdir(mode=0o700, parents=True)
    root.chmod(0o700)
    heals(root, asked)


@pytest.mark.parametrize("what", ["a file", "a folder", "a folder beside a damaged kernel", "a dangling link"])
def test_what_fa2gen_did_not_make_stays_in_the_place_of_an_entry(root, what, asked, caplog):
    place = root / key_of(UNIT).folder
    root.mkdir(mode=0o700)
    if what == "a file":
        place.write_text("years of work")
    elif what == "a dangling link":
        place.symlink_to("nowhere")
    else:
        if "damaged" in what:
            Store(root).compile_once(UNIT)
            (place / "kernel.cubin").write_bytes(b"")
            asked.clear()
        place.mkdir(mode=0o700, exist_ok=True)
        (place / "notes").write_text("years of work")
    before = {path for path in root.rglob("*") if ".locks" not in path.parts}
    cache = Store(root)
    assert cache.compile_once(UNIT).source == cache.compile_once(UNIT).source == UNIT.source
    assert asked == [UNIT] and not cache.keeps(key_of(UNIT))
    assert len(warnings(caplog)) == 1 and str(place) in warnings(caplog)[0]
    assert {path for path in root.rglob("*") if ".locks" not in path.parts} == before


# Other processes -----------------------------------------------------------------------------------------------------


def start(task: str, root: Path, *arguments: object) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, __file__, task, str(root), *map(str, arguments)])


def wait_for(condition, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "another process did not get that far"
        time.sleep(0.005)


def test_sixteen_processes_compile_a_key_once(root, tmp_path):
    ready, go, log = (tmp_path / name for name in ("ready", "go", "log"))
    ready.mkdir()
    processes = [start("compile", root, log, ready, go) for _ in range(16)]
    wait_for(lambda: len([*ready.iterdir()]) == 16)
    go.touch()
    assert [process.wait(30) for process in processes] == [0] * 16
    assert len(log.read_text().splitlines()) == 1
    assert not leftovers(root)


# Four files and folders are synced, then the folder is renamed: each is a place to die at.
@pytest.mark.parametrize("step", [1, 2, 3, 4, "rename"])
def test_a_writer_killed_at_any_step_leaves_nothing_half_written(root, step, asked):
    process = start("stall", root, step)
    wait_for(lambda: root.is_dir() and (root / "stalled").exists())
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert len(leftovers(root)) == 1
    assert not (root / key_of(UNIT).folder).exists()

    started = time.monotonic()
    Store(root).compile_once(UNIT)
    assert time.monotonic() - started < 30, "the dead process's lock was waited for"
    assert Store(root).try_load(key_of(UNIT)) == entry_of()
    assert len(leftovers(root)) == 1, "a temporary folder that may be in use was removed"

    os.utime(root / leftovers(root)[0], (time.time() - 3700,) * 2)
    Store(root).compile_once(replace(UNIT, name="another"))
    assert not leftovers(root)
    assert len(asked) == 2


def test_a_lock_that_is_held_too_long_is_not_waited_for(root, asked):
    Store(root).compile_once(UNIT)
    lock = root / ".locks" / f"{key_of(UNIT).folder}.lock"
    (root / key_of(UNIT).folder / "meta.json").unlink()
    with lock.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        started = time.monotonic()
        Store(root, lock_seconds=0.2).compile_once(UNIT)
    assert 0.2 <= time.monotonic() - started < 30  # by default it is 60
    assert len(asked) == 2


@pytest.mark.parametrize(
    "code", [errno.ENOSYS, errno.ENOLCK, errno.EIO, errno.EOPNOTSUPP, errno.EINTR], ids=errno.errorcode.get
)
def test_a_file_system_without_locks_costs_one_warning(root, monkeypatch, code, asked, caplog):
    monkeypatch.setattr(fcntl, "flock", failing(code))
    monkeypatch.setattr(time, "sleep", None)  # nothing is waited for
    cache = Store(root)
    for name in ("one", "another"):
        cache.compile_once(replace(UNIT, name=name))
    assert len(asked) == len(cache.list()) == 2
    assert len(warnings(caplog)) == 1 and "cannot be locked" in warnings(caplog)[0] and str(root) in warnings(caplog)[0]


def test_a_lock_that_may_be_held_is_waited_for_and_says_so(root, monkeypatch, caplog):
    """EACCES: held by a process of another machine, or no lock at all. Waited for, but not in silence."""
    monkeypatch.setattr(fcntl, "flock", failing(errno.EACCES))
    monkeypatch.setattr(files, "_PATIENCE_SECONDS", 0.05)
    assert Store(root, lock_seconds=0.2).compile_once(UNIT)
    assert "waiting for another process" in warnings(caplog)[0] and "went on without the lock" in warnings(caplog)[1]


def test_locks_leave_no_files(root):
    Store(root).compile_once(UNIT)
    assert not [*(root / ".locks").iterdir()]


def test_a_lock_lets_one_in_at_a_time(tmp_path):
    """Also while each removes the file that the others wait at."""
    inside, most = [], []

    def enter(number: int) -> None:
        with files.lock(tmp_path / "lock", 60):
            inside.append(number)
            most.append(len(inside))
            time.sleep(0.001)
            inside.remove(number)

    with ThreadPoolExecutor(8) as pool:
        [*pool.map(enter, range(100))]
    assert most == [1] * 100


def test_a_child_forked_while_a_thread_holds_the_lock_gets_the_kernel(root, monkeypatch):
    """It waits for the parent's compilation: neither for a thread that it has not, nor for its own copy of the lock."""
    slowly(monkeypatch)
    cache = Store(root)
    thread = threading.Thread(target=cache.compile_once, args=(UNIT,))
    thread.start()
    wait_for(lambda: [*root.glob(".locks/*")])
    child = os.fork()
    if child == 0:
        signal.alarm(10)  # a child that hangs is ended by it
        os._exit(0 if cache.compile_once(UNIT).source == UNIT.source else 1)
    thread.join()
    assert os.waitpid(child, 0)[1] == 0


def test_racing_writers_and_a_reader_see_whole_entries_only(root):
    writers = [start("overwrite", root, 60) for _ in range(2)]
    seen = set()
    while any(writer.poll() is None for writer in writers):
        seen.add(Store(root).try_load(key_of(UNIT)) == entry_of())
    assert [writer.returncode for writer in writers] == [0, 0]
    assert True in seen
    assert not leftovers(root)


def test_a_folder_that_others_replace_at_this_moment_is_ours(root):
    """Moved away and put back between two looks at it, by another writer."""
    folder, away = root / "entry", root / "away"
    files.write_folder(folder, {"kernel.cu": b""}, {"sha256": files.seal({"kernel.cu": b""})})
    done = threading.Event()

    def replaces():
        while not done.is_set():
            os.rename(folder, away)
            os.rename(away, folder)

    other = threading.Thread(target=replaces)
    other.start()
    try:
        found = [files._strangers(folder, ("kernel.cu", "meta.json")) for _ in range(3000)]
    finally:
        done.set()
        other.join()
    assert not any(found)


def test_of_two_equal_entries_the_first_stays(root):
    cache = Store(root)
    cache.put(key_of(UNIT), entry_of())
    inode = (root / key_of(UNIT).folder).stat().st_ino
    assert cache.put(key_of(UNIT), entry_of())
    assert (root / key_of(UNIT).folder).stat().st_ino == inode
    assert not leftovers(root)


# Disks that do not take it -------------------------------------------------------------------------------------------


def works_in_memory(root: Path, asked: list[Unit], caplog) -> Store:
    """Kernels come, each is compiled once per store, and there is one warning, which names the folder."""
    cache = Store(root)
    units = [UNIT, replace(UNIT, name="another"), replace(UNIT, name="a_third")]
    entries = [cache.compile_once(unit) for unit in units for _ in range(3)]
    assert all(cubin_is_whole(entry.cubin) for entry in entries)
    assert asked == units
    assert len(warnings(caplog)) == 1 and str(root) in warnings(caplog)[0]
    Store(root).compile_once(UNIT)
    assert len(warnings(caplog)) == 1, "a second store warns again"
    return cache


def failing(code: int):
    def fail(*arguments, **options):
        raise OSError(code, os.strerror(code), str(arguments[0]) if arguments else None)

    return fail


def test_a_root_that_cannot_be_made(root, monkeypatch, asked, caplog):
    monkeypatch.setattr(Path, "mkdir", lambda path, **options: failing(errno.EROFS)(path))
    works_in_memory(root, asked, caplog)


def test_a_root_that_is_a_file(root, asked, caplog):
    root.write_text("hello")
    works_in_memory(root, asked, caplog)
    assert root.read_text() == "hello"


def test_a_read_only_root_serves_what_it_has(root, monkeypatch, asked, caplog):
    real, read_only = os.open, failing(errno.EROFS)
    there = Store(root).compile_once(replace(UNIT, name="there"))
    asked.clear()
    monkeypatch.setattr(tempfile, "mkdtemp", lambda dir, **options: failing(errno.EROFS)(dir))
    monkeypatch.setattr(
        os,
        "open",
        lambda path, flags, *mode: (read_only if flags & os.O_CREAT else real)(path, flags, *mode),
    )
    cache = works_in_memory(root, asked, caplog)
    assert cache.try_load(key_of(replace(UNIT, name="there"))) == there


@pytest.mark.parametrize("call", ["fsync", "rename"])
def test_a_disk_that_fills_up_while_writing(root, monkeypatch, call, asked, caplog):
    def fail(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device", str(root))

    monkeypatch.setattr(os, call, fail)
    works_in_memory(root, asked, caplog)
    assert not leftovers(root)


def test_a_file_size_limit_that_the_kernel_enforces(root, asked, caplog):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        entry = Store(root).compile_once(UNIT)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert entry.source == UNIT.source
    assert len(warnings(caplog)) == 1
    assert not leftovers(root)


def test_locks_that_do_not_work_cost_only_the_single_flight(root, asked, caplog):
    root.mkdir(mode=0o700)
    (root / ".locks").write_text("not a folder")
    Store(root).compile_once(UNIT)
    assert Store(root).try_load(key_of(UNIT))
    assert not warnings(caplog)


def test_threads_compile_a_key_once_without_a_disk(root, monkeypatch, asked):
    root.write_text("not a folder")
    slowly(monkeypatch)
    cache = Store(root)
    threads = [threading.Thread(target=cache.compile_once, args=(UNIT,)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(asked) == 1


# Other users ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o775, 0o702, 0o1777], ids=oct)
def test_a_root_that_others_can_write_is_not_used(root, mode, asked, caplog):
    Store(root).compile_once(UNIT)  # as if planted
    asked.clear()
    root.chmod(mode)
    before = sorted(root.rglob("*"))
    works_in_memory(root, asked, caplog)
    assert "chmod go-w" in warnings(caplog)[0]
    assert sorted(root.rglob("*")) == before
    assert Store(root).list() == ()
    with pytest.raises(StoreError, match="chmod go-w"):
        Store(root).clear()


def test_a_root_of_another_user_is_not_used(root, monkeypatch, asked, caplog):
    Store(root).compile_once(UNIT)
    asked.clear()
    monkeypatch.setattr(os, "geteuid", lambda: root.stat().st_uid + 1)
    works_in_memory(root, asked, caplog)
    assert "belongs to uid" in warnings(caplog)[0]


@pytest.mark.parametrize("mode", [0o755, 0o700, 0o750, 0o500])
def test_a_root_that_others_can_only_read_is_used(root, mode, caplog):
    Store(root).compile_once(UNIT)
    root.chmod(mode)
    assert Store(root).try_load(key_of(UNIT))
    assert not warnings(caplog)


def test_an_entry_planted_while_others_could_write_is_replaced(root, asked):
    Store(root).compile_once(UNIT)
    (root / key_of(UNIT).folder).chmod(0o777)
    heals(root, asked)


# The ahead-of-time folder --------------------------------------------------------------------------------------------


@pytest.fixture
def aot(tmp_path, monkeypatch):
    """A folder as `fa2gen build --out` writes it, in the environment."""
    folder = tmp_path / "kernels"
    write_entry(folder / PLAN.name, entry_of())
    write_manifest(folder)
    monkeypatch.setenv("FA2GEN_AOT_DIR", str(folder))
    return folder


def manifest(folder: Path, **changes: object) -> None:
    file = folder / "manifest.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def row_of(folder: Path, place: object) -> dict[str, object]:
    row: dict[str, object] = json.loads((folder / "manifest.json").read_text())["kernels"][0]
    return {**row, "folder": place}


def test_a_kernel_built_ahead_needs_no_generator_and_no_cache(aot, root, monkeypatch, asked):
    monkeypatch.setattr(store, "plan_unit", None)
    entry = Store(root).get_or_compile(PLAN)
    assert entry == entry_of()
    assert not asked and not root.exists()


def test_a_kernel_that_was_not_built_ahead_is_compiled(aot, root, asked, caplog):
    Store(root).get_or_compile(replace(PLAN, name="another"))
    Store(root).get_or_compile(PLAN, target="sm_90")  # built, but for another target
    assert len(asked) == 2
    assert not warnings(caplog)


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda folder: manifest(folder, fa2gen="0.0.1"), "0.0.1"),
        (lambda folder: manifest(folder, schema=99), "99"),
        (lambda folder: manifest(folder, kernels=[{"name": "x"}]), "cannot be read"),
        (lambda folder: (folder / "manifest.json").unlink(), "cannot be read"),
        (lambda folder: (folder / "manifest.json").write_text("[]"), "cannot be read"),
        (lambda folder: folder.chmod(0o777), "others can write it"),
        (lambda folder: (folder / PLAN.name).chmod(0o775), "others can write it"),
        (lambda folder: (folder / PLAN.name / "kernel.cubin").chmod(0o666), "others can write its files"),
        (lambda folder: (folder / "manifest.json").chmod(0o666), "others can write it"),
        (lambda folder: manifest(folder, kernels=[row_of(folder, "../outside")]), "'../outside'"),
        (lambda folder: manifest(folder, kernels=[row_of(folder, "/outside")]), "'/outside'"),
        (lambda folder: manifest(folder, kernels=[row_of(folder, "..")]), "'..'"),
        (lambda folder: manifest(folder, kernels=[row_of(folder, "a\0b")]), "no folder in it"),
        (lambda folder: manifest(folder, kernels=[row_of(folder, 7)]), "cannot be read"),
        (lambda folder: (folder / PLAN.name / "kernel.cubin").write_bytes(b"\x7fELF"), "is damaged"),
        (lambda folder: (folder / PLAN.name / "kernel.cubin").unlink(), "is damaged"),
        (lambda folder: (folder / PLAN.name / "meta.json").write_text("{}"), "is damaged"),
    ],
)
def test_an_unfit_folder_is_a_miss_with_one_warning(aot, root, spoil, reason, monkeypatch, asked, caplog):
    spoil(aot)
    cache = Store(root)
    for _ in range(3):
        assert cache.get_or_compile(PLAN).source == UNIT.source
    assert len(asked) == 1
    assert len(warnings(caplog)) == 1 and str(aot) in warnings(caplog)[0] and reason in warnings(caplog)[0]

    monkeypatch.setenv("FA2GEN_DISABLE_JIT", "1")
    with pytest.raises(StoreError) as caught:
        Store(root / "empty").get_or_compile(PLAN)
    assert reason in str(caught.value) and str(aot) in str(caught.value)


def test_a_folder_of_another_user_is_named_in_the_error(aot, root, monkeypatch):
    monkeypatch.setenv("FA2GEN_DISABLE_JIT", "1")
    monkeypatch.setattr(files, "installed", lambda: {4711})
    monkeypatch.setattr(store, "installed", lambda: {4711})
    with pytest.raises(StoreError, match="belongs to uid"):
        Store(root).get_or_compile(PLAN)


def test_a_kernel_with_other_launch_facts_is_not_used(aot, root, asked, caplog):
    Store(root).get_or_compile(replace(PLAN, num_threads=512))
    assert len(asked) == 1
    assert "launched differently" in warnings(caplog)[0]


def test_a_manifest_lists_whole_entries_of_this_version(aot):
    folder = aot / "old"
    entry = entry_of(replace(UNIT, name="old"))
    write_entry(folder, replace(entry, meta={**entry.meta, "fa2gen": "0.0.1"}))
    write_entry(aot / "broken", entry_of(replace(UNIT, name="broken")))
    (aot / "broken" / "kernel.cu").unlink()
    write_manifest(aot)
    assert [row["name"] for row in json.loads((aot / "manifest.json").read_text())["kernels"]] == [PLAN.name]


def test_without_jit_a_cached_kernel_is_used(root, monkeypatch, asked):
    Store(root).get_or_compile(PLAN)
    monkeypatch.setenv("FA2GEN_DISABLE_JIT", "1")
    assert Store(root).get_or_compile(PLAN).source == UNIT.source
    assert len(asked) == 1


def test_without_jit_a_miss_says_what_to_build(root, monkeypatch, asked):
    monkeypatch.setenv("FA2GEN_DISABLE_JIT", "1")
    with pytest.raises(StoreError) as caught:
        Store(root).get_or_compile(PLAN)
    assert "fa2gen build --arch sm90 --head-dim 128 --out DIR" in str(caught.value)
    assert PLAN.name in str(caught.value) and "FA2GEN_AOT_DIR is not set" in str(caught.value)
    assert not asked


def test_without_jinja_a_miss_says_what_to_build(aot, root, monkeypatch):
    def no_jinja(plan, target):
        raise ModuleNotFoundError("No module named 'jinja2'")

    monkeypatch.setattr(store, "plan_unit", no_jinja)
    with pytest.raises(StoreError, match=r"fa2gen build .* No module named 'jinja2'"):
        Store(root).get_or_compile(replace(PLAN, name="another"))


# What other processes do: `python test_store.py TASK ROOT ...` -------------------------------------------------------


PATCH = pytest.MonkeyPatch()  # of a process that ends with its task


def task_compile(root: Path, log: str, ready: str, go: str) -> None:
    """Asks for the kernel at the same time as all others, and writes a line to `log` when it has to compile it."""

    def compile_unit(unit: Unit) -> Compiled:
        with open(log, "a") as file:
            file.write(f"{os.getpid()}\n")
        time.sleep(0.3)
        return compile_quietly(unit)

    PATCH.setattr(store, "compile_unit", compile_unit)
    Path(ready, str(os.getpid())).touch()
    wait_for(Path(go).exists)
    assert Store(root).compile_once(UNIT) == entry_of()


def task_stall(root: Path, step: str) -> None:
    """Compiles, and stops for ever at the given sync or at the rename, holding the lock."""
    real, calls = os.fsync, 0

    def stall(*arguments: object) -> None:
        (root / "stalled").touch()
        time.sleep(60)

    def fsync(descriptor: int) -> None:
        nonlocal calls
        calls += 1
        (stall if str(calls) == step else real)(descriptor)

    PATCH.setattr(os, "fsync", fsync)
    if step == "rename":
        PATCH.setattr(os, "rename", stall)
    PATCH.setattr(store, "compile_unit", compile_quietly)
    Store(root).compile_once(UNIT)


def task_overwrite(root: Path, times: str) -> None:
    """Damages the entry and puts it again."""
    cache = Store(root)
    for _ in range(int(times)):
        cache.put(key_of(UNIT), entry_of())
        (root / key_of(UNIT).folder / "meta.json").unlink(missing_ok=True)
        assert cache.put(key_of(UNIT), entry_of())


if __name__ == "__main__":
    tasks: dict[str, Any] = {"compile": task_compile, "stall": task_stall, "overwrite": task_overwrite}
    tasks[sys.argv[1]](Path(sys.argv[2]), *sys.argv[3:])
