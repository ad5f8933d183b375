"""Where the templates and the specs are: inside the package when installed from a wheel, beside it in a checkout."""

from __future__ import annotations

import functools
import tomllib
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent
_CHECKOUT = _PACKAGE.parent


def data_dir(name: str) -> Path:
    """The folder `name` ("templates" or "specs").

    Raises FileNotFoundError, naming both places, when the installation has neither.
    """
    inside = _PACKAGE / name
    if inside.is_dir():
        return inside
    beside = _CHECKOUT / name
    # A wheel without its data must not pick up a stranger's `templates` that happens to lie in site-packages.
    if beside.is_dir() and in_checkout():
        return beside
    if not _PACKAGE.is_dir():
        archive = _PACKAGE.parent
        raise FileNotFoundError(
            f"fa2gen is run from {archive}, where its {name}/ cannot be read: unpack it, or install it"
        )
    raise FileNotFoundError(f"fa2gen's {name}/ is neither at {inside} nor at {beside}: the installation is incomplete")


@functools.cache
def in_checkout() -> bool:
    """Whether this is a source tree (also when installed editable) rather than an installed wheel: whether fa2gen's own
    pyproject.toml lies beside the package. With `pip install --target .` a stranger's may."""
    try:
        project = tomllib.loads((_CHECKOUT / "pyproject.toml").read_text(encoding="utf-8")).get("project")
    except (OSError, ValueError):
        return False
    return isinstance(project, dict) and project.get("name") == "fa2gen" and not (_PACKAGE / "specs").is_dir()
