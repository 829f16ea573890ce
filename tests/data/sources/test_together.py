"""Processes that ask for the same cache entry at once: it is made once, and all get the same."""

import multiprocessing
import os
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
import torch

from offrl.data import dataset, neighbors
from offrl.data.sources import files, generated, minari, rollout
from tests.data.sources import test_files, test_minari
from tests.data.sources.test_generated import one_process


def lists(place):
    obs = torch.randn(200, 2, generator=torch.Generator().manual_seed(0))
    table = neighbors.StateNeighbors.build(obs, obs[:, :1].tanh(), "digest", cache=place / "home")
    return table.rows.tolist()


ASK = {
    "files": lambda place: files.load(place / "log.npz").digest,
    "minari": lambda place: minari.load("toy/log-v0").digest,
    "generated": lambda place: generated.load("hopper", "random", 50).digest,
    "neighbors": lists,
}


def ask(name, place, barrier):
    """Load when all are ready, with a writer that is slow and leaves a note."""

    def slowly(folder, fill, write=dataset.write):
        (place / f"made-{os.getpid()}").touch()
        time.sleep(0.3)
        write(folder, fill)

    for module in (dataset, minari, neighbors):
        module.write = slowly
    rollout.in_processes = one_process
    barrier.wait(60)
    return ASK[name](place)


@pytest.mark.parametrize("name", ASK)
def test_two_processes_that_ask_at_once_make_an_entry_once(tmp_path, monkeypatch, name):
    monkeypatch.setenv("OFFRL_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    test_files.store(tmp_path / "log.npz", test_files.log([0] * 50))
    test_minari.store("toy/log-v0", [test_minari.episode(50)])
    context = multiprocessing.get_context("fork")
    with context.Manager() as manager, ProcessPoolExecutor(2, mp_context=context) as pool:
        barrier = manager.Barrier(2)
        asked = [pool.submit(ask, name, Path(tmp_path), barrier) for _ in range(2)]
        one, two = (job.result(60) for job in asked)
    assert one == two
    assert len(list(tmp_path.glob("made-*"))) == 1
