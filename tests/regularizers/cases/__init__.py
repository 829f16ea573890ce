"""Every module of the package with inputs that exercise it; each family has a file here.

The tests of tests/regularizers/test_interface.py run over all of them.
"""

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass

from torch import Generator

from offrl.regularizers import RegInputs, Regularizer


@dataclass(frozen=True)
class Case:
    """One module under test.

    Attributes:
        name: shown in the test's id.
        make: a fresh module.
        inputs: (generator, B, T) -> inputs with B rows, of float32; leaves that receive gradient
            require it; two consecutive rows form a group, and where a mask is used the first
            token of every row is valid and about a third of the rest is not.
        differentiable: names of inputs whose gradient is compared ("logp", "logits", "features").
        control: also meaningful for (B,) inputs (T = 1 is compared with a control actor).
        rows_mix: a row's output depends on other rows (groups, batch statistics), so that only
            permuting all rows together is an invariance.
        exact_gradient: False where the gradient is by design not that of the value (a detached
            factor), so that finite differences do not apply.
    """

    name: str
    make: Callable[[], Regularizer]
    inputs: Callable[[Generator, int, int], RegInputs]
    differentiable: tuple[str, ...] = ("logp",)
    control: bool = False
    rows_mix: bool = False
    exact_gradient: bool = True


def all_cases() -> list[Case]:
    found: list[Case] = []
    for module in sorted(m.name for m in pkgutil.iter_modules(__path__)):
        found += importlib.import_module(f"{__name__}.{module}").CASES
    return found
