"""LaMemo's kernels in every configuration, each run again, and its model over segments, against float64."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import pytest
import torch

from lmn_kernels import LookAheadMemory
from tests.gpu import look_ahead_trial
from tests.gpu.look_ahead_trial import QUICK_SHAPES, SHAPES, LookAheadCase, check_kernels, check_model
from tests.support.places import DTYPES, Place, everywhere, short


class KernelCase(NamedTuple):
    shape: LookAheadCase
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{self.shape.text} {short(self.dtype)}"


class ModelCase(NamedTuple):
    attn_type: int
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"attn_type={self.attn_type} {short(self.dtype)}"


def kernel_cases(place: Place) -> list[KernelCase]:
    shapes = QUICK_SHAPES if place.quick else SHAPES
    cases = [KernelCase(shape, dtype) for dtype in DTYPES for shape in shapes]
    return [case for case in cases if case.dtype != torch.float32 or case.shape.size <= 64]


def model_cases(place: Place) -> list[ModelCase]:
    return [ModelCase(attn_type, dtype) for attn_type, dtype in itertools.product((3, 31, 32, 0), DTYPES)]


@everywhere(kernel_cases, first=lambda case: case.shape is SHAPES[1] and case.dtype != torch.float16)
def test_kernels_are_those_of_float64(place, case, record_property):
    record_property("error", max(found for _, found in check_kernels(case.shape, case.dtype, place)))


@everywhere(model_cases)
def test_a_model_over_segments_is_that_of_float64(place, case, record_property):
    record_property("error", max(found for _, found in check_model(case.attn_type, case.dtype, place)))


class Claimed(Place):
    """Where kernels are said to serve."""

    backend = "triton"


def test_the_check_sees_a_model_that_another_backend_serves(monkeypatch):
    def model(*sizes, backend, **options):
        return LookAheadMemory(*sizes, backend="reference", **options)

    monkeypatch.setattr(look_ahead_trial, "LookAheadMemory", model)
    with pytest.raises(AssertionError, match="expected that triton serves .*'reference'"):
        list(check_model(0, torch.float32, Claimed("cpu", True)))
