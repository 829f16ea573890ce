"""The arrows between packages, and what a light import must not load."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import offrl

ROOT = Path(offrl.__file__).parent
ALLOWED = {
    "algos": {"nets", "regularizers", "data", "engine.method", "engine.optim"},
    "regularizers": {"regularizers"},
    "integrations": {"integrations", "regularizers"},
    "nets": {"nets"},
    "data": {"data", "engine.method", "seeding", "envs", "nets", "system"},
    "envs": {"envs", "seeding"},
    "engine": {"engine", "data", "envs", "nets.kernels", "seeding"},
    "results": {"results", "data", "envs"},
}


def imported(path):
    """Modules of ours that a file imports, without the leading `offrl.`."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("offrl."):
            yield node.module.removeprefix("offrl.")
        elif isinstance(node, ast.Import):
            for name in node.names:
                if name.name.startswith("offrl."):
                    yield name.name.removeprefix("offrl.")


@pytest.mark.parametrize("package", sorted(ALLOWED))
def test_arrows_point_one_way(package):
    for path in (ROOT / package).rglob("*.py"):
        for module in imported(path):
            allowed = any(module == a or module.startswith(f"{a}.") for a in ALLOWED[package])
            assert allowed, f"{path.name} imports offrl.{module}"


def test_engine_knows_no_algorithm():
    for path in (ROOT / "engine").rglob("*.py"):
        assert not any(module.startswith("algos") for module in imported(path))


def test_regularizers_load_torch_and_nothing_heavier():
    code = (
        "import sys, offrl.regularizers; "
        "heavy = {'gymnasium', 'mujoco', 'hydra', 'scipy', 'matplotlib', 'minari', 'h5py'}; "
        "ours = {m for m in sys.modules if m.startswith('offrl.')}; "
        "print(sorted(heavy & set(sys.modules)), "
        "sorted(m for m in ours if not m.startswith('offrl.regularizers')))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[] []"


def test_every_algorithm_offers_what_the_command_line_needs():
    from offrl import config

    for name in config.algorithms():
        method = config.module(name)
        assert all(hasattr(method, part) for part in ("FIELDS", "Config", "make", "stages"))
        assert "Differences from" in (method.__doc__ or ""), f"{name} must name its differences"
        assert (ROOT.parent / "configs" / "algo" / f"{name}.yaml").exists()
