"""Five ways of installing: each finds its own package and its own configs, wherever it is started.

A copy of the checkout, named `offrl`, whose configs are marked; installed into virtual environments
that see the packages of this one, so that nothing is downloaded.
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SHIPPED = ["configs", "offrl", "scripts", "tests", "tools"]
FILES = ["LICENSE", "MANIFEST.in", "README.md", "constraints.txt", "pyproject.toml", "setup.cfg"]
LOOK = """
import sys
import offrl
print(offrl.__file__)
sys.argv = ["offrl", "train", "--help", "algo=td3bc"]
from offrl.cli import main
main()
"""
pytestmark = pytest.mark.slow


def clone(folder: Path, marker: str) -> Path:
    """A checkout in `folder` whose TD3+BC has a preset of that name."""
    checkout = folder / "offrl"
    ignore = shutil.ignore_patterns("__pycache__")
    for name in SHIPPED:
        shutil.copytree(ROOT / name, checkout / name, symlinks=True, ignore=ignore)
    harness = Path("benchmarks/harness")
    shutil.copytree(ROOT / harness, checkout / harness, ignore=ignore)
    for name in FILES:
        shutil.copy(ROOT / name, checkout)
    with open(checkout / "configs" / "algo" / "td3bc.yaml", "a") as file:
        file.write(f"  {marker}: {{steps: 10}}\n")
    return checkout


def environment(folder: Path) -> Path:
    """The Python of a new virtual environment that sees the packages of this one."""
    venv.create(folder)
    (site,) = folder.glob("lib/python*/site-packages")
    # an editable installation is a file in there, and such files count where they lie only
    (site / "these.pth").write_text(sysconfig.get_paths()["purelib"])
    return folder / "bin" / "python"


def run(*command, cwd, **changes) -> str:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, env=kept | changes, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def install(python: Path, *what) -> None:
    options = ["--quiet", "--no-deps", "--no-index", "--no-build-isolation", "--ignore-installed"]
    run(python, "-m", "pip", "install", *options, *what, cwd="/")


def builds(checkout: Path, folder: Path, *kinds: str) -> None:
    run(sys.executable, "-m", "build", "--no-isolation", *kinds, "-o", folder, checkout, cwd="/")


def check(python: Path, place: Path, marker: str, *folders: Path, **changes) -> None:
    """Started in each folder, the package is the one at `place` and its configs hold the marker."""
    for folder in folders:
        found, told = run(python, "-c", LOOK, cwd=folder, **changes).split("\n", 1)
        assert Path(found) == place / "__init__.py"
        assert f"presets: full, quick, {marker}" in told
        assert "methods: bc, " in told


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    return clone(tmp_path_factory.mktemp("clones"), "marked")


def test_a_wheel_holds_the_configs_the_policies_and_the_c_files(checkout, tmp_path):
    builds(checkout, tmp_path, "--wheel")
    (wheel,) = tmp_path.glob("*.whl")
    held = set(zipfile.ZipFile(wheel).namelist())
    package = checkout / "offrl"
    data = [p for p in package.rglob("*") if p.suffix in (".c", ".json", ".py", ".safetensors")]
    data += (package / "configs").rglob("*.yaml")
    assert len(data) > 20
    assert {str(path.relative_to(checkout)) for path in [*data, package / "py.typed"]} <= held
    assert not {name.split("/")[0] for name in held} - {"offrl", "offrl-0.1.0.dist-info"}
    python = environment(tmp_path / "venv")
    install(python, wheel)
    (site,) = tmp_path.glob("venv/lib/python*/site-packages")
    check(python, site / "offrl", "marked", tmp_path, checkout.parent)
    command = python.parent / "offrl"
    usage = run(command, "--help", cwd=checkout.parent)
    commands = re.findall(r"(?m)^  ([a-z]+) ", usage)
    assert len(commands) == 6
    for word in commands:
        assert "=" in run(command, word, "--help", cwd=checkout.parent)


def test_a_source_archive_holds_the_tests_and_what_measures_and_gives_the_wheel(checkout, tmp_path):
    builds(checkout, tmp_path, "--sdist")
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        held = {name.partition("/")[2] for name in file.getnames()}
    sources = [p for name in [*SHIPPED[2:], "benchmarks"] for p in (checkout / name).rglob("*.py")]
    assert {str(path.relative_to(checkout)) for path in sources} <= held
    python = environment(tmp_path / "venv")
    install(python, archive)
    (site,) = tmp_path.glob("venv/lib/python*/site-packages")
    check(python, site / "offrl", "marked", tmp_path, checkout.parent)


def test_an_editable_installation_and_a_path_beside_it(checkout, tmp_path):
    python = environment(tmp_path / "venv")
    install(python, "--editable", checkout)
    check(python, checkout / "offrl", "marked", tmp_path, checkout.parent)
    other = clone(tmp_path, "other")
    folders = tmp_path, checkout.parent  # both hold a checkout named offrl
    check(python, other / "offrl", "other", *folders, PYTHONPATH=str(other))
    check(python, checkout / "offrl", "marked", *folders)


def test_a_path_alone(checkout, tmp_path):
    python = environment(tmp_path / "venv")
    folders = tmp_path, checkout.parent
    check(python, checkout / "offrl", "marked", *folders, PYTHONPATH=str(checkout))


def test_a_checkout_whose_link_became_a_text(tmp_path):
    """As on Windows, where git writes the link's target into a file."""
    checkout = clone(tmp_path, "text")
    (checkout / "offrl" / "configs").unlink()
    (checkout / "offrl" / "configs").write_text("../configs")
    python = environment(tmp_path / "venv")
    check(python, checkout / "offrl", "text", tmp_path, PYTHONPATH=str(checkout))
    install(python, "--editable", checkout)
    check(python, checkout / "offrl", "text", tmp_path)
