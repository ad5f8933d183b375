"""`python -m fa2gen.shim SCRIPT ...` runs a script that finds fa2gen as flash_attn.

Exit status: the script's; 2 where there is none.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

from fa2gen.shim import install_as_flash_attn

_USAGE = "usage: python -m fa2gen.shim SCRIPT [ARGUMENTS ...]: runs it, with fa2gen as flash_attn"

if __name__ == "__main__":
    script = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if script in ("-h", "--help"):
        print(_USAGE)
        sys.exit(0 if len(sys.argv) > 1 else 2)
    if not Path(script).exists():
        print(f"{script} is not there\n{_USAGE}", file=sys.stderr)
        sys.exit(2)
    install_as_flash_attn()
    del sys.argv[0]
    sys.path[0] = str(Path(sys.argv[0]).resolve().parent)
    runpy.run_path(sys.argv[0], run_name="__main__")
