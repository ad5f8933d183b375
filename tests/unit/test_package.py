"""What an installation holds: the wheel, the editable install, the checkout."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

import fa2gen

ROOT = Path(__file__).resolve().parents[2]
DATA = ("templates", "specs")


def hatchling(*arguments: str) -> None:
    """Run hatchling's own command line on the checkout: no pip, no network."""
    command = [sys.executable, "-m", "hatchling", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    folder = tmp_path_factory.mktemp("wheel")
    hatchling("build", "-t", "wheel", "-d", str(folder))
    (path,) = folder.glob("*.whl")
    return zipfile.ZipFile(path)


@pytest.fixture(scope="module")
def site(wheel: zipfile.ZipFile, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, installed: for a pure Python wheel that is what unpacking does."""
    folder = tmp_path_factory.mktemp("site")
    wheel.extractall(folder)
    return folder


def run_installed(site: Path, *arguments: str, cwd: Path) -> str:
    """Run Python with only the unpacked wheel's fa2gen in reach (dependencies come from the environment)."""
    environment = {**os.environ, "PYTHONPATH": str(site), "PYTHONSAFEPATH": "1"}
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("name", DATA)
def test_wheel_carries_all_data(wheel, name):
    """Every tracked-or-new file of templates/ and specs/, byte for byte."""
    here = {
        str(p.relative_to(ROOT)): p for p in (ROOT / name).rglob("*") if p.is_file() and "__pycache__" not in p.parts
    }
    there = {n.removeprefix("fa2gen/") for n in wheel.namelist() if n.startswith(f"fa2gen/{name}/")}
    assert there == here.keys()
    assert all(wheel.read(f"fa2gen/{n}") == p.read_bytes() for n, p in here.items())


def test_wheel_has_only_the_package_at_top_level(wheel):
    """No cli.py, tests or generated: in site-packages they would be everybody's."""
    assert {n.split("/")[0] for n in wheel.namelist()} == {"fa2gen", f"fa2gen-{fa2gen.__version__}.dist-info"}
    assert "fa2gen/py.typed" in wheel.namelist()


def test_wheel_metadata(wheel):
    info = f"fa2gen-{fa2gen.__version__}.dist-info"
    metadata = Parser().parsestr(wheel.read(f"{info}/METADATA").decode())
    required = metadata.get_all("Requires-Dist") or []
    assert metadata["License-Expression"] == "BSD-3-Clause"
    assert f"{info}/licenses/LICENSE" in wheel.namelist()
    assert not [r for r in required if r.startswith("torch") and "extra ==" not in r], "torch must stay optional"
    assert not [r for r in required if r.startswith("cuda-python")], "the metapackage pins older parts"
    assert "fa2gen = fa2gen.cli:main" in wheel.read(f"{info}/entry_points.txt").decode()


def test_installed_wheel_finds_its_data(site, tmp_path):
    code = (
        "from fa2gen import _paths; print(_paths.data_dir('templates'), _paths.data_dir('specs'), _paths.in_checkout())"
    )
    assert run_installed(site, "-c", code, cwd=tmp_path).split() == [
        str(site / "fa2gen" / "templates"),
        str(site / "fa2gen" / "specs"),
        "False",
    ]


def test_installed_wheel_renders_a_kernel(site, tmp_path):
    name = "fa2_fwd_sm90_bf16_d128_m128_n128_s2_w8"
    source = run_installed(site, "-m", "fa2gen", "render", name, cwd=tmp_path)
    assert f"{name}(" in source


def without_data(site, folder):
    """The modules alone, beside somebody's folder of the name of ours."""
    (folder / "fa2gen").mkdir()
    (folder / "templates").mkdir()
    for module in (site / "fa2gen").glob("*.py"):
        (folder / "fa2gen" / module.name).write_bytes(module.read_bytes())


def test_wheel_without_data_takes_no_stranger_s(site, tmp_path):
    """`templates` beside the package in site-packages is not ours."""
    without_data(site, tmp_path)
    code = (
        "from fa2gen import _paths\n"
        "try: _paths.data_dir('templates')\n"
        "except FileNotFoundError as error: print('refused:', error)"
    )
    assert run_installed(tmp_path, "-c", code, cwd=tmp_path).startswith("refused: fa2gen's templates/ is neither at")


def test_a_stranger_s_project_beside_the_package_is_no_checkout(site, tmp_path):
    """`pip install --target .` in any project's folder: neither its pyproject.toml nor its templates/ are ours."""
    without_data(site, tmp_path)
    code = (
        "from fa2gen import _paths; print(_paths.in_checkout())\n"
        "try: _paths.data_dir('templates')\n"
        "except FileNotFoundError: print('refused')"
    )
    for project in ('[project]\nname = "another"', "project = 7", "[", ""):
        (tmp_path / "pyproject.toml").write_text(project)
        assert run_installed(tmp_path, "-c", code, cwd=tmp_path).split() == ["False", "refused"]


def test_from_an_archive_the_error_says_so(wheel, tmp_path):
    code = (
        "from fa2gen import _paths; print(_paths.in_checkout())\n"
        "try: _paths.data_dir('templates')\n"
        "except FileNotFoundError as error: print(error)"
    )
    said = run_installed(Path(str(wheel.filename)), "-c", code, cwd=tmp_path)
    assert said.startswith(f"False\nfa2gen is run from {wheel.filename}, where its templates/ cannot be read")


def test_editable_install_points_at_the_checkout(tmp_path):
    code = f"from hatchling.build import build_editable; build_editable({str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, timeout=120, check=True)
    (path,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(path) as editable:
        (pth,) = (n for n in editable.namelist() if n.endswith(".pth"))
        assert editable.read(pth).decode().strip() == str(ROOT)
        outside = {n.split("/")[0] for n in editable.namelist()} - {pth, f"fa2gen-{fa2gen.__version__}.dist-info"}
    # A second, frozen copy of the data would be seen before the checkout's.
    assert not outside


def test_checkout_finds_its_data():
    from fa2gen import _paths

    assert _paths.in_checkout()
    assert [_paths.data_dir(name) for name in DATA] == [ROOT / name for name in DATA]


def test_public_names_resolve():
    assert all(hasattr(fa2gen, name) for name in fa2gen.__all__)
    assert set(fa2gen.__all__) == set(fa2gen._HOME) <= set(dir(fa2gen))
    with pytest.raises(AttributeError, match="no_such_name"):
        fa2gen.no_such_name  # noqa: B018


def test_type_checkers_see_the_same_names():
    tree = ast.parse((ROOT / "fa2gen" / "__init__.py").read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    seen = {alias.name: node.module for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert seen == {name: f"fa2gen.{module}" for name, module in fa2gen._HOME.items()}


def test_type_checkers_know_what_comes_back(tmp_path):
    """One tensor, or three values with `return_attn_probs`; a misspelt option or name is an error."""
    (tmp_path / "use.py").write_text(
        "import fa2gen\n"
        "from fa2gen import flash_attn_func as f\n"
        "def use(x: object, flag: bool) -> None:\n"
        "    f(x, x, x, causal=True).float()\n"
        "    f(x, x, x, 0.0, None, True, (3, 0), deterministic=True).float()\n"
        "    out, lse, none = f(x, x, x, return_attn_probs=True)\n"
        "    f(x, x, x, return_attn_probs=flag)\n"
        "    f(x, x, x, causual=True)  # error\n"
        "    fa2gen.nonsense  # error\n"
    )
    command = [sys.executable, "-m", "mypy", "--config-file", str(ROOT / "pyproject.toml"), str(tmp_path / "use.py")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    wrong = {int(line.split(":")[1]) for line in done.stdout.splitlines() if ": error:" in line}
    assert wrong == {8, 9}, done.stdout + done.stderr


def test_make_says_that_it_installs(tmp_path):
    """pip is silent while it downloads; a log of `make demo` shows a line every few seconds all the same."""
    make = shutil.which("make")
    if make is None:
        pytest.skip("needs make")
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / ".venv/bin").mkdir(parents=True)
    (tmp_path / ".venv/bin/python").touch()
    command = [make, ".venv/.stamp-demo", "PIP=sleep 6 && echo"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0 and (tmp_path / ".venv/.stamp-demo").exists(), done.stderr
    assert "still installing\n" in done.stdout and "--editable .\n" in done.stdout
