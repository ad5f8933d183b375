"""What every tier shares: `gpu` tests are skipped where there is no GPU, and no test touches the user's cache."""

from __future__ import annotations

import functools
import os
import shutil
import tempfile
from pathlib import Path

import pytest

GPU_TESTS = Path(__file__).parent / "gpu"


def pytest_configure(config: pytest.Config) -> None:
    """Tests see no FA2GEN_* variable of the user's, and one kernel cache of their own for all xdist workers.

    Torch gets one thread: the workers share the cores already, and threads that wait for each other there made small
    operators ten times as slow.
    """
    if "PYTEST_XDIST_WORKER" in os.environ:
        return  # inherits what the controller has set below
    for name in [name for name in os.environ if name.startswith("FA2GEN_")]:
        del os.environ[name]
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["FA2GEN_CACHE_DIR"] = folder = tempfile.mkdtemp(prefix="fa2gen-tests-")
    config.add_cleanup(functools.partial(shutil.rmtree, folder, ignore_errors=True))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if GPU_TESTS in item.path.parents:
            item.add_marker("gpu")
        if item.get_closest_marker("gpu") and (reason := _no_gpu()):
            item.add_marker(pytest.mark.skip(reason=reason))


@functools.cache
def _no_gpu() -> str:
    """Why GPU tests cannot run here; "" when they can. Imports torch: asked only when such a test was collected."""
    try:
        import torch
    except ImportError:
        return "needs torch"
    return "" if torch.cuda.is_available() else "needs an NVIDIA GPU"
