"""Kernels run on a GPU if there is one, else in Triton's interpreter on CPU tensors."""

from __future__ import annotations

import inspect
from importlib.util import find_spec

import numpy as np
import pytest
import torch

from tests.kernels.triton.ahead_of_time import compile_cases

if find_spec("triton") is None:
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(scope="session")
def device():
    """Where the kernels under test run."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def exact_casts(monkeypatch):
    """Casts of the interpreter are those of a GPU, which does not warn of Inf and NaN either."""
    from triton.runtime import interpreter

    from tests.kernels.triton.exact_casts import convert_float

    monkeypatch.setattr(interpreter, "_convert_float", convert_float)
    patch = vars(interpreter)["_patch_lang_tensor"]

    def patch_with_index(tensor, scope):  # Triton 3.6's is refused by NumPy 2.4 and newer
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    monkeypatch.setattr(interpreter, "_patch_lang_tensor", patch_with_index)
    with np.errstate(all="ignore"):
        yield


@pytest.fixture(scope="session")
def compiled(tmp_path_factory):
    """The machine code of every function without arguments in `cases`, by its name."""
    from tests.kernels.triton import cases

    names = [
        name
        for name, case in inspect.getmembers(cases, inspect.isfunction)
        if case.__module__ == cases.__name__ and not inspect.signature(case).parameters
    ]
    kernels = compile_cases(
        [f"{cases.__name__}:{name}" for name in names], tmp_path_factory.mktemp("triton")
    )
    return {case.split(":")[1]: compiled for case, compiled in kernels.items()}
