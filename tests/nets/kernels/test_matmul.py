"""The choice of matrix products: measured once, remembered, and never between different values."""

import json

import pytest
import torch

from offrl.nets.kernels import matmul
from offrl.nets.kernels.chain import chain

MACHINE = "a machine"


@pytest.fixture(autouse=True)
def restored():
    yield
    matmul.chosen = frozenset()


def onednn():
    try:
        matmul.linear(torch.zeros(64, 64), torch.zeros(64, 64), None, "none")
    except (AttributeError, RuntimeError):
        return False
    return True


@pytest.mark.skipif(not onednn(), reason="torch is built without oneDNN here")
def test_products_by_onednn_equal_torchs_own():
    g = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=g, requires_grad=True)  # noqa: E731
    dims, x = [(80, 96), (96, 72), (72, 6)], draw(128, 80)
    params = [draw(*shape) for i, o in dims for shape in ((i, o), (1, o))]
    found = []
    for chosen in ((), matmul.KINDS):
        matmul.chosen = frozenset(chosen)
        out = chain(x, list(zip(params[::2], params[1::2], strict=True)))
        found.append([out, *torch.autograd.grad((out * 1e-3).square().sum(), [x, *params])])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)


def test_a_choice_is_measured_once_per_machine(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(matmul, "measured", lambda: seen.append(1) or ["forward"])
    for _ in range(3):
        assert matmul.select_backend(tmp_path, MACHINE) == (
            "matrix products by oneDNN, the fastest here: forward; the rest by torch's own library"
        )
        assert matmul.chosen == {"forward"}
    assert len(seen) == 1
    matmul.select_backend(tmp_path, "another machine")
    assert len(seen) == 2
    assert [p.name for p in tmp_path.iterdir()] == ["matmul.json"]


@pytest.mark.parametrize("text", ["", "[]", "{", "3"])
def test_a_damaged_choice_is_measured_again(tmp_path, monkeypatch, text):
    monkeypatch.setattr(matmul, "measured", list)
    (tmp_path / "matmul.json").write_text(text)
    assert matmul.select_backend(tmp_path, MACHINE) == (
        "matrix products by torch's own library, the fastest here"
    )
    assert list(json.loads((tmp_path / "matmul.json").read_text()).values()) == [[]]


def test_a_choice_that_cannot_be_kept_is_told_and_holds_for_the_process(
    tmp_path, monkeypatch, caplog
):
    monkeypatch.setattr(matmul, "measured", lambda: ["forward"])
    (tmp_path / "home").write_text("a file where the folder should be")
    matmul.select_backend(tmp_path / "home", MACHINE)
    assert matmul.chosen == {"forward"}
    assert "cannot be kept" in caplog.text


@pytest.mark.parametrize(
    ("linear", "told"),
    [
        (lambda *a: torch.ops.mkldnn.no_such_operator(*a), "cannot be used"),
        (lambda x, y, bias, post: torch.zeros(len(x), y.shape[1]), "other values"),
    ],
)
def test_an_operator_that_is_gone_or_wrong_is_not_used(monkeypatch, caplog, linear, told):
    monkeypatch.setattr(matmul, "linear", linear)
    assert matmul.measured() == []
    assert told in caplog.text
