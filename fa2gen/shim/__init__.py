"""flash_attn without flash_attn: scripts and packages that import it run on fa2gen, unchanged.

    fa2gen.install_as_flash_attn()          in this process, before or after others look for flash_attn
    fa2gen shim wheel --out DIR             a wheel of that name, for pip: launchers, workers, several processes
    python -m fa2gen.shim SCRIPT ...        runs a script as if it had begun with the first

What they find is in the folder `site`: a distribution named flash-attn, version 2.8.2+fa2gen, with the modules and the
names that Megatron, TransformerEngine, diffusers, ring-flash-attention, unsloth, vLLM and others import. What
flash_attn has beside attention (losses, norms, fused layers) is not there; who asks for that catches the ImportError.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import sys
from pathlib import Path
from typing import Any

from fa2gen._when_imported import when_imported
from fa2gen.errors import InvalidInput

__all__ = ["SITE", "VERSION", "install_as_flash_attn"]

SITE = Path(__file__).parent / "site"
VERSION = "2.8.2+fa2gen"
_TOP_LEVEL = ("flash_attn", "flash_attn_2_cuda")


def install_as_flash_attn(force: bool = False) -> None:
    """Have `import flash_attn` find fa2gen's in this process, and importlib.metadata a distribution of that name.

    force  also where a real flash_attn is installed or imported, which is then not seen any more.

    Where fa2gen's is found already, also by its wheel, nothing is done. Subprocesses see none of this: for them install
    the wheel. Raises InvalidInput where there is a real one.
    """
    version, place = _found()
    if version == VERSION:
        return
    real = f"version {version}, {place}" if version else ""
    if real and not force:
        raise InvalidInput(
            f"flash_attn is there already: {real}. Uninstall it, or hide it with install_as_flash_attn(force=True)"
        )
    for name in [name for name in sys.modules if name.partition(".")[0] in _TOP_LEVEL]:
        del sys.modules[name]
    sys.path.insert(0, str(SITE)) if real else sys.path.append(str(SITE))
    importlib.invalidate_caches()
    when_imported("transformers.utils.import_utils", _tell_transformers)


def _found() -> tuple[str, str | None]:
    """(version, file) of the flash_attn that is imported or would be; the first is empty where there is none."""
    module = sys.modules.get("flash_attn")
    if module is not None:
        return str(getattr(module, "__version__", "unknown")), getattr(module, "__file__", None)
    spec = importlib.util.find_spec("flash_attn")
    if spec is None:
        return "", None
    try:
        return importlib.metadata.version("flash-attn"), spec.origin
    except importlib.metadata.PackageNotFoundError:
        return "unknown", spec.origin


def _tell_transformers() -> None:
    """transformers looks for packages once, and keeps what it found."""
    utils: Any = sys.modules["transformers.utils.import_utils"]
    mapping = getattr(utils, "PACKAGE_DISTRIBUTION_MAPPING", None)
    if mapping is not None:
        mapping["flash_attn"] = ["flash-attn"]
    for name, function in vars(utils).items():
        if hasattr(function, "cache_clear") and ("flash_attn" in name or "package" in name):
            function.cache_clear()
