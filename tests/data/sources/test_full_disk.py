"""Data made where the disk has no room: an error in words, and nothing half-made.

A limit on the size of files stands in for the full disk: writes beyond it fail alike.
"""

import os
import subprocess
import sys

import numpy as np
import pytest

from offrl.data.dataset import store
from tests.data.sources import test_files, test_minari

SCRIPT = """
import resource, signal, sys
from pathlib import Path
import numpy as np
from offrl.data.sources import files, generated, minari
from offrl.data.dataset import store, write

def small(place):
    store(place / "starts.npy", np.arange(1010))  # the last writes of np.save are not checked
    return {{}}

if __name__ == "__main__":
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # then a write raises
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))
    try:
        {call}
    except OSError as error:
        sys.exit(f"OSError: {{error}}")
"""


@pytest.mark.parametrize(
    ("call", "place"),
    [
        ("files.load(Path('log.npz'))", "files/log-"),
        ("minari.load('toy/log-v0')", "minari/toy/log-v0"),
        ("generated.load('hopper', 'random', rows=500, workers=1)", "generated/hopper-random-500-"),
        ("write(Path('home/small'), small)", "small"),
    ],
)
def test_a_full_disk_is_told_and_nothing_is_left(tmp_path, monkeypatch, call, place):
    monkeypatch.setenv("OFFRL_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    test_files.store(tmp_path / "log.npz", test_files.log([0] * 2000))
    test_minari.store("toy/log-v0", [test_minari.episode(2000)])
    (tmp_path / "script.py").write_text(SCRIPT.format(call=call))
    run = subprocess.run(
        [sys.executable, "script.py"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert run.returncode == 1
    told = run.stderr.splitlines()[-1]
    assert told.startswith("OSError: cannot write the data cache")
    assert place in told
    assert "free some space" in told
    assert [path for path in (tmp_path / "home").rglob("*.*") if path.suffix != ".lock"] == []


def test_stored_arrays_are_npy_files(tmp_path):
    for array in (np.arange(5), np.ones((3, 2), np.float32), np.ones((4, 3)).T, np.zeros((0, 2))):
        store(tmp_path / "a.npy", array)
        again = np.load(tmp_path / "a.npy")
        assert again.dtype == array.dtype
        assert np.array_equal(again, array)
