"""Every kernel, forward and backward, and steps, on small shapes: what compute-sanitizer watches.

Nothing is compared here; other tests do.
"""

from __future__ import annotations

import torch

from lmn_kernels import decode_
from tests.gpu.layer_trial import FORMS, KINDS
from tests.gpu.layer_trial import Trial as LayerTrial
from tests.gpu.look_ahead_trial import QUICK_SHAPES, SHAPES, inputs, run_kernels
from tests.gpu.step_trial import GIVEN, extension
from tests.gpu.step_trial import Trial as StepTrial
from tests.support.places import everywhere

BOTH = (torch.bfloat16, torch.float32)


def layer_kinds(place):
    return [(kind, 16 if place.quick else 64) for kind in KINDS] + ([] if place.quick else [("linear", 256)])


@everywhere(layer_kinds)
def test_layers(place, case):
    for dtype in BOTH:
        for form in FORMS[:5]:
            trial = LayerTrial(*case, dtype, place)
            assert all(torch.isfinite(found).all() for found in trial.served(form))


@everywhere(lambda place: [*GIVEN[1:6], GIVEN[11], GIVEN[12]])
@torch.no_grad()
def test_steps(place, case):
    """Every way that a summarizer's weight lies, the expander, the block, many rows."""
    extension(place)
    for dtype in BOTH:
        trial = StepTrial(case, dtype, dtype, place, tokens=2)
        y = decode_(trial.x, trial.start, trial.weights, slots=trial.slots, backend="cpp")
        assert y.isfinite().all() and y.dtype == dtype


@everywhere(lambda place: [shape.text for shape in (QUICK_SHAPES if place.quick else SHAPES)])
def test_segments(place, case):
    """Every head size."""
    (shape,) = (shape for shape in (*QUICK_SHAPES, *SHAPES) if shape.text == case)
    for dtype in BOTH if shape.size <= 64 else BOTH[:1]:
        found = run_kernels(shape, inputs(shape, dtype, place.torch_device), place)
        assert all(part.isfinite().all() for part in found)
