"""The layer in every form, kind and dtype against float64, on a side stream, and whatever memory held before."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import pytest
import torch

from lmn_kernels import LogarithmicMixing
from tests.gpu.layer_trial import BANK, FORMS, HEADS, KINDS, Trial, judge
from tests.gpu.step_trial import extension
from tests.support.allocations import as_it_comes, filled
from tests.support.places import DTYPES, GPU, REHEARSAL, Place, everywhere, short
from tests.support.served import Served

F32, BF16 = torch.float32, torch.bfloat16
RUNS = 20


class LayerCase(NamedTuple):
    kind: str
    size: int
    dtype: torch.dtype
    form: str

    def __str__(self) -> str:
        return f"{self.kind} E={self.size} {short(self.dtype)} {self.form}"

    def trial(self, place: Place) -> Trial:
        if self.form == "step":
            extension(place, self.dtype)
        return Trial(self.kind, self.size, self.dtype, place)


def layer_cases(place: Place) -> Iterator[LayerCase]:
    size, wide = (16, 24) if place.quick else (64, 256)
    for kind, width in (*((kind, size) for kind in KINDS), ("linear", wide)):
        for dtype in DTYPES:
            if not place.quick or dtype == (F32 if width == size else BF16):
                yield from (LayerCase(kind, width, dtype, form) for form in FORMS)


@everywhere(layer_cases, first=lambda case: case.kind == "linear" and case.form == "plain" and case.dtype != DTYPES[1])
def test_a_layer_is_that_of_float64(place, case, record_property):
    record_property("error", judge(case.trial(place), case.form, case.dtype))


def poisoned_cases(place: Place) -> list[LayerCase]:
    sizes = (16,) if place.quick else (64, 256)
    cases = [LayerCase("linear", size, dtype, form) for size in sizes for dtype in DTYPES for form in FORMS[:5]]
    return [*cases, *(LayerCase("expander", sizes[0], F32, form) for form in FORMS[:5])]


def same_from_poison(trial: Trial, form: str) -> None:
    with filled(False):
        plain = trial.served(form)
    with filled(True):
        poisoned = trial.run(trial.layer, form)
    for name, a, b in zip(["y", "x", *dict(trial.layer.named_parameters())], plain, poisoned, strict=True):
        assert torch.isfinite(b).all(), f"{name}: not finite under poison"
        assert torch.equal(a, b), f"{name}: changes under poison"


@everywhere(poisoned_cases)
def test_results_do_not_depend_on_uninitialised_memory(place, case, monkeypatch):
    """To the bit (R7)."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    same_from_poison(case.trial(place), case.form)


class RepeatedCase(NamedTuple):
    size: int
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"E={self.size} {short(self.dtype)}"


def repeated_cases(place: Place) -> list[RepeatedCase]:
    return [RepeatedCase(size, dtype) for size in ((16,) if place.quick else (64, 256)) for dtype in DTYPES]


def same_again(place: Place, case: RepeatedCase) -> None:
    length, device = 40 if place.quick else 4000, place.torch_device
    layer = LogarithmicMixing(
        case.size, HEADS, BANK, init="variance_preserving", backend=place.backend, dtype=case.dtype, device=device
    )
    x = torch.randn(2, length, case.size, device=device).to(case.dtype).requires_grad_()
    cotangent, first = torch.randn_like(x), []
    with Served() as served:
        for number in range(RUNS):
            y = layer(x)
            found = [y.detach(), *torch.autograd.grad(y, [x, *layer.parameters()], cotangent)]
            first = first or found
            same = all(torch.equal(f, s) for f, s in zip(found, first, strict=True))
            assert same, f"run {number + 1} differs from the first"
    served.check(place.backend, "build_tree", "build_tree_backward", "attend", "attend_backward")


@everywhere(repeated_cases)
def test_equal_runs_are_equal_without_any_flag(place, case):
    """To the bit, forward and backward (R15)."""
    with as_it_comes():
        same_again(place, case)


@pytest.mark.gpu
@pytest.mark.parametrize("size", [64, 256])
def test_a_layer_on_a_side_stream(size):
    """A launch on another stream than the current one would read x before it is there (R11)."""
    trial = Trial("linear", size, F32, GPU)
    expected = trial.run(trial.layer, "plain")
    given, trial.x = trial.x, torch.full_like(trial.x, float("nan"))
    long = torch.randn(8192, 8192, device=given.device)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(4):
            long = long @ long * 1e-2
        trial.x.copy_(given)
        got = trial.run(trial.layer, "plain")
    torch.cuda.synchronize()
    assert all(torch.equal(g, e) for g, e in zip(got, expected, strict=True)), "differs from the default stream"


# The checks can fail


def test_the_judge_sees_a_wrong_layer():
    trial = Trial("linear", 16, F32, REHEARSAL)
    judge(trial, "padded", F32)
    with torch.no_grad():
        trial.layer.sva.v.weight[0, 0] += 1e-2
    with pytest.raises(AssertionError, match="y: error .* is over"):
        judge(trial, "padded", F32)


@pytest.mark.parametrize("form", FORMS)
def test_the_judge_sees_a_layer_that_another_backend_serves(form):
    trial = LayerCase("linear", 16, F32, form).trial(REHEARSAL)
    trial.backend = "triton"
    with pytest.raises(AssertionError, match="expected that triton serves.*reference"):
        judge(trial, form, F32)


def test_the_judge_sees_steps_of_the_reference():
    trial = LayerCase("linear", 16, F32, "step").trial(REHEARSAL)
    trial.layer.step_backend = "reference"
    with pytest.raises(AssertionError, match="the extension has not served"):
        judge(trial, "step", F32)


def test_the_poison_check_sees_uninitialised_memory(monkeypatch):
    run = Trial.run

    def careless(self, layer, form):
        y, *rest = run(self, layer, form)
        # Its memory is what the next tensor gets: not that of an older, poisoned one.
        torch.zeros(1)
        return [y + torch.empty_like(y).nan_to_num(1.0) * 0 + torch.isnan(torch.empty(1)), *rest]

    monkeypatch.setattr(Trial, "run", careless)
    with pytest.raises(AssertionError, match="y: changes under poison"):
        same_from_poison(Trial("linear", 16, F32, REHEARSAL), "plain")


def test_the_determinism_check_sees_noise(monkeypatch):
    forward = LogarithmicMixing.forward
    noisy = lambda self, x: forward(self, x) + 1e-3 * torch.rand(())  # noqa: E731
    monkeypatch.setattr(LogarithmicMixing, "forward", noisy)
    with pytest.raises(AssertionError, match="run 2 differs from the first"):
        same_again(REHEARSAL, RepeatedCase(16, F32))
