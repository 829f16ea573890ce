"""Facts of the machine, and locks on files."""

import errno
import fcntl
import os
import signal
import subprocess
import sys
import threading

import pytest

from offrl import system
from offrl.data.dataset import one_at_a_time
from offrl.system import cores


def test_cores_are_those_this_process_may_use_or_all_where_that_is_unknown(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {1, 5, 6}, raising=False)
    assert cores() == 3
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 12)
    assert cores() == 12
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert cores() == 1


HOLD = """
import sys, time
from pathlib import Path
from offrl.data.dataset import one_at_a_time

with one_at_a_time(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_one_who_waits_says_so_once_and_a_killed_holder_releases(tmp_path, caplog):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, tmp_path / "medium"],
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert holder.stdout.readline() == b"held\n"
    with one_at_a_time(tmp_path / "expert"):  # another entry of the folder
        assert not caplog.records
    threading.Timer(0.3, holder.kill).start()
    with one_at_a_time(tmp_path / "medium"):
        assert holder.wait() == -signal.SIGKILL
    holder.stdout.close()
    assert [record.getMessage() for record in caplog.records] == [
        f"another process is making {tmp_path / 'medium'}; waiting for it"
    ]


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_told(tmp_path, monkeypatch, code):
    def flock(file, how):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", flock)
    words = f"cannot lock files in {tmp_path}: {os.strerror(code)}; set OFFRL_HOME to a writable"
    with pytest.raises(OSError, match=words), one_at_a_time(tmp_path / "medium"):
        pass
    words = f"cannot lock files in {tmp_path}: .*; start the run from a writable folder"
    with pytest.raises(OSError, match=words), system.only_one(tmp_path):
        pass


def test_a_run_directory_is_held_by_one_process(tmp_path):
    with system.only_one(tmp_path):
        with pytest.raises(OSError, match=f"another process is training in {tmp_path}; wait"):
            with system.only_one(tmp_path):
                pass
    with system.only_one(tmp_path):
        pass
