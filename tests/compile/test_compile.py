"""NVRTC through cuda.core, with small kernels written by hand: the report, the errors, the cubin. No GPU needed."""

from __future__ import annotations

import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from fa2gen.compile import OPTIONS, Unit, compile_unit, compiler_version, cubin_is_whole
from fa2gen.errors import CompileError
from fa2gen.store import Store

LAUNCH = {"num_threads": 128, "shared_memory_bytes": 4096, "params": [], "tensor_maps": []}


def unit(source: str, target: str = "sm_90a") -> Unit:
    """A kernel `k`, whose line n came from line 100 + n of a template."""
    source = source.strip("\n") + "\n"
    origins = tuple(f"sm90/fwd.cu.j2:{101 + line}" for line in range(source.count("\n")))
    return Unit("k", source, target, LAUNCH, origins)


PLAIN = unit("""
extern "C" __global__ void __launch_bounds__(128) k(float* p) {
  p[threadIdx.x] *= 2.0f;
}
""")

SPILLS = unit("""
extern "C" __global__ void __launch_bounds__(128, 16) k(float* p) {
  float v[100];
#pragma unroll
  for (int i = 0; i < 100; ++i) v[i] = p[i * threadIdx.x];
#pragma unroll
  for (int i = 0; i < 100; ++i) p[i] = v[99 - i] * v[(i * 7) % 100];
}
""")


def refusal(bad: Unit) -> str:
    with pytest.raises(CompileError) as caught:
        compile_unit(bad)
    return str(caught.value)


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_90a"])
def test_a_kernel_compiles_for_each_target(target):
    compiled = compile_unit(replace(PLAIN, target=target))
    report = compiled.report
    assert (compiled.name, compiled.source) == ("k", PLAIN.source)
    assert cubin_is_whole(compiled.cubin)
    assert 0 < report.registers <= 32
    assert (report.spill_bytes, report.stack_bytes, report.notes) == (0, 0, ())
    assert report.shared_memory_bytes == 4096
    assert 0 < report.compile_seconds < 3


def test_a_small_kernel_takes_under_a_second():
    # Each has another source: NVRTC must not have seen it.
    units = [replace(PLAIN, source=f"// {i}\n{PLAIN.source}") for i in range(3)]
    assert statistics.median(compile_unit(u).report.compile_seconds for u in units) < 1


def test_the_cubin_depends_on_neither_folder_nor_thread(tmp_path, monkeypatch):
    first = compile_unit(PLAIN).cubin
    monkeypatch.chdir(tmp_path)
    with ThreadPoolExecutor(2) as pool:
        again = [compiled.cubin for compiled in pool.map(compile_unit, [PLAIN] * 4)]
    assert set(again) == {first}
    assert str(tmp_path).encode() not in first


def test_the_first_compilations_of_a_process_may_be_concurrent():
    code = f"""
import sys
from concurrent.futures import ThreadPoolExecutor
from fa2gen.compile import Unit, compile_unit
sys.setswitchinterval(1e-6)  # the import of cuda.core is then interrupted, not only by luck
with ThreadPoolExecutor(4) as pool:
    print(len([*pool.map(compile_unit, [Unit("k", {PLAIN.source!r}, "sm_90a", {LAUNCH!r})] * 4)]))
"""
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "4"


def test_spills_are_reported():
    report = compile_unit(SPILLS).report
    assert report.registers == 32
    assert report.spill_store_bytes > 0 and report.spill_load_bytes > 0 and report.stack_bytes > 0
    assert report.spill_bytes == report.spill_store_bytes + report.spill_load_bytes


def test_what_ptxas_could_not_do_is_noted():
    source = """
extern "C" __global__ void __launch_bounds__(384) k(float* p) {
  if (threadIdx.x < 128) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 24;");
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 240;");
  }
  p[threadIdx.x] = 1.0f;
}
"""
    (note,) = compile_unit(unit(source)).report.notes
    assert "C7508" in note and "setmaxnreg" in note


def test_warnings_are_noted_with_their_template_line():
    (note,) = compile_unit(unit(PLAIN.source.replace("{\n", "{\n  int unused = 3;\n"))).report.notes
    assert note.startswith("kernel.cu(2) [from sm90/fwd.cu.j2:102]: warning")
    assert "unused" in note


def test_errors_show_the_template_line_and_the_text_around_them():
    message = refusal(unit(PLAIN.source.replace("2.0f", "scale").replace("}", '  int n = "text";\n}')))
    assert message.startswith(f"k does not compile for sm_90a (NVRTC {compiler_version()}):\n")
    assert (
        'kernel.cu(2) [from sm90/fwd.cu.j2:102]: error: identifier "scale" is undefined\n'
        '       1 | extern "C" __global__ void __launch_bounds__(128) k(float* p) {\n'
        "  >    2 |   p[threadIdx.x] *= scale;\n"
        '       3 |   int n = "text";\n'
    ) in message
    assert "kernel.cu(3) [from sm90/fwd.cu.j2:103]: error:" in message


def test_an_error_on_a_line_of_unknown_origin_is_shown_without_one():
    bad = replace(PLAIN, source=PLAIN.source.replace("2.0f", "scale"), origins=())
    assert 'kernel.cu(2): error: identifier "scale"' in refusal(bad)


def test_many_errors_are_cut_short():
    body = "".join(f"  p[{i}] = missing_{i};\n" for i in range(50))
    assert refusal(unit(f'extern "C" __global__ void k(float* p) {{\n{body}}}')).count("error:") == 8


def test_ptxas_errors_are_traced_to_the_line_of_the_asm():
    source = """
__device__ __forceinline__ void multiply(float a) {
  // the next line is not PTX
  asm volatile("wgmmma.bogus %0;" :: "f"(a));
}

extern "C" __global__ void k(float* p) {
  multiply(p[0]);
  multiply(p[1]);
}
"""
    message = refusal(unit(source))
    assert "kernel.cu(3) [from sm90/fwd.cu.j2:103]: ptxas error:" in message
    assert '  >    3 |   asm volatile("wgmmma.bogus' in message


def test_an_instruction_of_another_target_is_traced_too():
    body = '  asm volatile("setmaxnreg.dec.sync.aligned.u32 24;");\n  p[0] = 1.0f;\n'
    message = refusal(unit(f'extern "C" __global__ void k(float* p) {{\n{body}}}', "sm_80"))
    assert "kernel.cu(2) [from sm90/fwd.cu.j2:102]: ptxas error: Instruction 'setmaxnreg.dec' not supported" in message


def test_a_ptxas_error_without_a_line_is_shown_as_it_is():
    body = "  __shared__ float v[100000];\n  v[threadIdx.x] = p[0];\n  __syncthreads();\n  p[0] = v[p != nullptr];\n"
    assert "uses too much shared data" in refusal(unit(f'extern "C" __global__ void k(float* p) {{\n{body}}}'))


def test_an_unknown_target_is_refused():
    assert "--gpu-architecture" in refusal(replace(PLAIN, target="sm_12345"))


def test_a_kernel_of_another_name_is_refused():
    assert "does not define a kernel of that name" in refusal(replace(PLAIN, name="another"))


def test_without_cuda_core_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "cuda.core", None)
    assert "pip install cuda-core nvidia-cuda-nvrtc" in refusal(PLAIN)


def test_every_truncation_of_a_cubin_is_seen():
    cubin = compile_unit(PLAIN).cubin
    assert cubin_is_whole(cubin)
    assert not any(cubin_is_whole(cubin[:length]) for length in range(len(cubin)))


@pytest.mark.parametrize(
    "damage",
    [
        lambda cubin: b"",
        lambda cubin: b"\0" * len(cubin),
        lambda cubin: cubin[:18] + (62).to_bytes(2, "little") + cubin[20:],  # x86-64
        lambda cubin: cubin[:40] + b"\xff" * 8 + cubin[48:],  # section headers far outside
        lambda cubin: cubin[:60] + b"\xff\xff" + cubin[62:],  # 65535 of them
    ],
)
def test_other_bytes_are_no_cubin(damage):
    assert not cubin_is_whole(damage(compile_unit(PLAIN).cubin))


def test_the_store_keeps_what_nvrtc_made(tmp_path, monkeypatch):
    cold = Store(tmp_path / "cache").compile_once(PLAIN)
    monkeypatch.setattr("fa2gen.store.compile_unit", None)  # a second compilation would fail
    warm = Store(tmp_path / "cache").compile_once(PLAIN)
    assert (warm.cubin, warm.report, warm.source) == (cold.cubin, cold.report, PLAIN.source)


def test_the_exact_compiler_is_known():
    assert compiler_version().count(".") >= 1


def test_importing_the_compiler_imports_no_cuda_and_no_jinja():
    code = "import sys, fa2gen.store; print([m for m in ('cuda', 'torch', 'jinja2') if m in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


def test_a_second_compilation_reports_as_the_first():
    """NVRTC keeps a cache of its own where there is a driver; a hit in it says nothing of registers and spills."""
    assert OPTIONS["no_cache"] is True


# Fork ----------------------------------------------------------------------------------------------------------------

FORK = """
import os, signal, sys, threading, time
from fa2gen.compile import Unit, compile_unit
from fa2gen.errors import CompileError

launch = {"num_threads": 128, "shared_memory_bytes": 0, "params": [], "tensor_maps": []}
body = "".join(f"p[{i}] = p[{i}] * {i}.5f + p[{i + 1}];" for i in range(300))

def unit(body):
    source = 'extern "C" __global__ void k(float* p) {' + body + '}'
    return Unit("k", source, "sm_90a", launch)

def child():
    signal.alarm(10)  # a child that hangs is ended by it
    try:
        compile_unit(unit("p[0] = 1.0f;"))
        os._exit(0)
    except CompileError as error:
        os._exit(3 if "forked" in str(error) else 4)

if sys.argv[1] == "amid":
    started = threading.Event()
    thread = threading.Thread(target=lambda: (started.set(), compile_unit(unit(body))))
    thread.start()
    started.wait()
    children = []
    while thread.is_alive() and len(children) < 6:
        time.sleep(0.05)
        pid = os.fork()
        if pid == 0:
            child()
        children.append(pid)
    thread.join()
else:
    compile_unit(unit("p[0] = 2.0f;"))
    children = [os.fork()]
    if children[0] == 0:
        child()
print(*(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children))
"""


def test_a_child_forked_while_a_thread_compiles_is_refused_by_name():
    """NVRTC's locks are held by threads that it has not: it used to hang, whatever it compiled."""
    done = subprocess.run([sys.executable, "-c", FORK, "amid"], capture_output=True, text=True, check=False)
    statuses = done.stdout.split()
    assert "3" in statuses and {*statuses} <= {"0", "3"}, done.stdout + done.stderr


def test_a_child_forked_after_a_compilation_compiles():
    done = subprocess.run([sys.executable, "-c", FORK, "after"], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["0"], done.stdout + done.stderr
