"""`python -m fa2gen.shim SCRIPT ...` runs a script that finds fa2gen as flash_attn."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

from fa2gen.shim import install_as_flash_attn

if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit("usage: python -m fa2gen.shim SCRIPT [ARGUMENTS ...]")
    install_as_flash_attn()
    del sys.argv[0]
    sys.path[0] = str(Path(sys.argv[0]).resolve().parent)
    runpy.run_path(sys.argv[0], run_name="__main__")
