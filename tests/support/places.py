"""Where a check of the GPU half runs: in full on a GPU, and in small on the CPU, as a rehearsal of the check itself."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import pytest
import torch

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class Place:
    """A device, and whether shapes are tiny there."""

    device: str
    quick: bool

    @property
    def backend(self) -> str:
        """Of what is parallel. Named, never "auto": a silent fallback must not be checked in place of the kernels."""
        return "triton" if self.device == "cuda" else "reference"

    @property
    def torch_device(self) -> torch.device:
        return torch.device(self.device, 0) if self.device == "cuda" else torch.device(self.device)

    @property
    def package(self) -> str:
        """Whose functions the operations call."""
        return "lmn_kernels._triton" if self.backend == "triton" else "python_ref"


GPU, REHEARSAL = Place("cuda", False), Place("cpu", True)


def everywhere(
    cases: Callable[[Place], Iterable[Any]], first: Callable[[Any], bool] = lambda case: False, large: bool = False
) -> pytest.MarkDecorator:
    """Parametrize a test by ``place`` and ``case``: those of a GPU, which need one, and those of a rehearsal.

    Args:
        cases: those of a place; each is named by its text.
        first: of those on a GPU, which are ``smoke``: run before all others.
        large: whether those on a GPU need much memory.
    """
    found = [pytest.param(REHEARSAL, case, id=f"cpu-{case}") for case in cases(REHEARSAL)]
    for case in cases(GPU):
        marks = [pytest.mark.gpu, *[pytest.mark.smoke] * first(case), *[pytest.mark.large] * large]
        found.append(pytest.param(GPU, case, id=f"cuda-{case}", marks=marks))
    return pytest.mark.parametrize(("place", "case"), found)


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
