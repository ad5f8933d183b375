"""A wheel named flash-attn, of a few small modules that import fa2gen."""

from __future__ import annotations

import base64
import hashlib
import zipfile
from pathlib import Path

from fa2gen.shim import SITE, VERSION

__all__ = ["write_wheel"]

_NAME = f"flash_attn-{VERSION}"
_WHEEL = "Wheel-Version: 1.0\nGenerator: fa2gen\nRoot-Is-Purelib: true\nTag: py3-none-any\n"


def write_wheel(folder: Path) -> Path:
    """The wheel's path in the folder, which is made if it is not there. The same bytes each time."""
    info = f"{_NAME}.dist-info"
    files = {
        path.relative_to(SITE).as_posix(): path.read_bytes()
        for path in sorted(SITE.rglob("*"))
        if path.is_file() and "__pycache__" not in path.parts
    }
    files[f"{info}/WHEEL"] = _WHEEL.encode()
    record = [f"{name},sha256={_digest(content)},{len(content)}\n" for name, content in files.items()]
    files[f"{info}/RECORD"] = "".join([*record, f"{info}/RECORD,,\n"]).encode()
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"{_NAME}-py3-none-any.whl"
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as wheel:
        for name, content in files.items():
            wheel.writestr(zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0)), content)
    return target


def _digest(content: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
