"""A mixing layer in its forms: on the backend under test, on the reference in its dtype, and there in float64."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bench.close import TOLERANCE, error
from lmn_kernels import LogarithmicMixing
from tests.support.places import Place
from tests.support.served import Served

KINDS: dict[str, dict[str, Any]] = {
    "linear": {},
    "expander": {"expand": 1},
    "conv_mixed": {"summarizer": "conv_mixed"},
    "depthwise_separable": {"summarizer": "depthwise_separable"},
}
FORMS = ("plain", "padded", "packed", "continued", "lean", "step")
HEADS, BANK = 4, 2
# Tokens that are taken one by one behind all others.
STEPS = 4


class Trial:
    """One layer three times: in the dtype under test, on the reference in that dtype, and there in float64."""

    def __init__(self, kind: str, size: int, dtype: torch.dtype, place: Place):
        device = place.torch_device
        self.backend = place.backend
        options: dict[str, Any] = {"init": "variance_preserving", "device": device, **KINDS[kind]}
        self.layer = LogarithmicMixing(
            size, HEADS, BANK, backend=place.backend, step_backend="cpp", dtype=dtype, **options
        )
        options["step_backend"] = "reference"
        self.same = LogarithmicMixing(size, HEADS, BANK, backend="reference", dtype=dtype, **options)
        self.exact = LogarithmicMixing(size, HEADS, BANK, backend="reference", dtype=torch.float64, **options)
        for other in (self.same, self.exact):
            other.load_state_dict(self.layer.state_dict())
        length = 20 if place.quick else 200
        self.x = torch.randn(3, length, size, device=device).to(dtype)
        self.cotangent = torch.randn(3, length, size, device=device).to(dtype)
        self.lengths = torch.tensor([length, 0, length // 3], device=device)
        self.bounds = torch.tensor([0, 3, 3, length, 2 * length + 1], device=device)

    def padding(self, form: str) -> Tensor | None:
        """``[3, L]`` bool; None where every row is a token."""
        row = torch.arange(self.x.shape[1], device=self.x.device)
        if form == "padded":
            return row >= self.lengths[:, None]
        if form == "packed":
            return (row + self.x.shape[1] * torch.arange(3, device=row.device)[:, None]) >= self.bounds[-1]
        return None

    def output(self, layer: LogarithmicMixing, form: str, x: Tensor) -> Tensor:
        split = x.shape[1] * 3 // 8
        if form == "padded":
            return layer(x, lengths=self.lengths)
        if form == "packed":
            return layer(x.reshape(1, -1, x.shape[2]), cu_seqlens=self.bounds).view(x.shape)
        if form == "continued":
            first, state = layer(x[:, :split], return_state=True)
            return torch.cat([first, layer(x[:, split:], state=state)], 1)
        if form == "lean":
            layer.lean = True
            y = layer(x)
            layer.lean = False
            return y
        if form == "step":
            # A step records no gradients in the extension.
            with torch.no_grad():
                first, state = layer.prefill(x[:, :-STEPS])
                rows = [first]
                for t in range(x.shape[1] - STEPS, x.shape[1]):
                    y, state = layer.step(x[:, t : t + 1], state)
                    rows.append(y)
                return torch.cat(rows, 1)
        return layer(x)

    def run(self, layer: LogarithmicMixing, form: str) -> list[Tensor]:
        """The output, and the gradients of x and of every parameter; steps have none."""
        x = self.x.to(next(layer.parameters()).dtype).detach()
        padding = self.padding(form)
        if padding is not None:
            x = x.masked_fill(padding[..., None], float("nan"))
        x.requires_grad_()
        y = self.output(layer, form, x)
        if form == "step":
            return [y]
        return [y.detach(), *torch.autograd.grad(y, [x, *layer.parameters()], self.cotangent.to(y.dtype))]

    def served(self, form: str) -> list[Tensor]:
        """`run` of the layer under test, with proof of whose kernels it were."""
        with Served() as served:
            found = self.run(self.layer, form)
        if form == "step":
            assert served.found.pop("step", None) == {"cpp"}, "the extension has not served the steps"
            served.check(self.backend, "build_tree", "attend")
        else:
            served.check(self.backend, "build_tree", "build_tree_backward", "attend", "attend_backward")
        return found


def judge(trial: Trial, form: str, dtype: torch.dtype) -> float:
    """The largest error of the output and of every gradient against float64.

    A tensor fails where its error is over the tolerance of its dtype, unless the reference in that dtype is
    at least half as wrong; and over ten tolerances in any case: products in TF32 would be.
    """
    worst = 0.0
    runs = [trial.served(form), *(trial.run(part, form) for part in (trial.same, trial.exact))]
    names = ["y", "x", *(name for name, _ in trial.layer.named_parameters())][: len(runs[0])]
    largest = max((t.square().mean().sqrt().item() for t in runs[2][1:]), default=0.0)
    for index, (name, got, same, exact) in enumerate(zip(names, *runs, strict=True)):
        assert torch.isfinite(got).all(), f"{name}: not finite"
        vanishes = exact.square().mean().sqrt().item() < 1e-12 * largest
        ours, theirs = (t.abs().max().item() / largest if vanishes else error(t, exact) for t in (got, same))
        worst = max(worst, ours)
        over = ours > 2 * theirs + 1e-6
        bar = TOLERANCE[dtype][min(index, 1)]
        fine = ours <= bar or (not over and ours <= 10 * bar)
        assert fine, f"{name}: error {ours:.3g} is over {bar:.3g}, that of the reference is {theirs:.3g}"
    padding = trial.padding(form)
    if padding is not None:
        assert not runs[0][0][padding].any() and not runs[0][1][padding].any(), "padding is not exactly 0"
    return worst
