"""What the GPU check times, once nothing is known to be wrong: ceilings, kernels, layers and their contenders.

Rows have keys such as ``training/naive/C``: what, who, shape. "training" is forward and backward with respect
to x and every parameter. Every contender is in bfloat16, on the same x.
"""

from __future__ import annotations

import functools
import importlib
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from bench.close import TOLERANCE, error
from bench.contenders import materialized
from bench.contenders.linear_attention import KINDS
from bench.contenders.problems import Form, Problem
from bench.contenders.providers import REGISTRY, materialized_layer
from bench.contenders.shapes import (
    CROSSOVER,
    QUICK_CROSSOVER,
    QUICK_SCALING,
    QUICK_SHAPES,
    SCALING,
    SHAPES,
    Shape,
    naive_peak_bytes,
    our_peak_bytes,
)
from bench.measure import timing
from bench.measure.comparison import Comparison, Limits
from bench.measure.gate import FORWARD, TRAINING, direction_work
from bench.measure.timing import Clock, Work, pair_ratio, spread, take_turns
from lmn_kernels import LogarithmicMixing
from lmn_kernels.layers.summarizers import Summarizer
from python_ref.layout import make_layout
from python_ref.sequences import Sequences

from .programs import clocks
from .stage import Report, Settings

DTYPE = torch.bfloat16
# A layer in bfloat16 against itself in float32: its stages' roundings add up.
SAME = 3 * TOLERANCE[DTYPE][0]
# The contenders of whole layers, as `bench.contenders.providers` calls them.
CONTENDERS = {
    "ours": "ours", "lean": "ours, lean", "naive": "materialised",
    "flash": "sdpa-flash", "cudnn": "sdpa-cudnn", "math": "sdpa-math",
}  # fmt: skip


def shapes_of(settings: Settings) -> dict[str, Shape]:
    return QUICK_SHAPES if settings.quick else SHAPES


def _randn(*sizes: int, device: torch.device) -> Tensor:
    return torch.randn(*sizes, dtype=DTYPE, device=device)


class Layer:
    """A mixing layer, its input, and everything that does its work in another way."""

    def __init__(self, shape: Shape, settings: Settings):
        self.shape, self.settings = shape, settings
        self.problem = Problem("layer", shape, DTYPE, settings.torch_device, settings.backend)

    def form(self, name: str) -> Form:
        """A contender by its name in `CONTENDERS`."""
        return REGISTRY["layer"][CONTENDERS[name]].build(self.problem)

    def work(self, what: str, name: str) -> Work:
        """``"forward"`` or ``"training"`` of a contender."""
        return direction_work(self.form(name), what, self.problem, REGISTRY["layer"][CONTENDERS[name]])

    def check(self, report: Report, *names: str) -> None:
        """Compare with the reference in float32: what disagrees is not timed.

        Raises:
            ValueError: a result is wrong.
        """
        shape, problem = self.shape, self.problem
        # Float64 would not fit beside the largest shapes.
        exact = LogarithmicMixing(
            shape.embedding, shape.heads, shape.bank, backend="reference", device=self.settings.torch_device
        )
        exact.load_state_dict(problem.layer.state_dict())
        with torch.no_grad():
            expected = exact(problem.x.float())
            for name in names:
                y = self.form(name).call()
                assert isinstance(y, Tensor)
                if y.dtype != DTYPE:
                    raise ValueError(f"{name} at {shape}: expected {DTYPE}, got {y.dtype}")
                found = error(y, expected)
                report({"case": f"{name} at {shape}", "error": found})
                if not found <= SAME:
                    raise ValueError(f"{name} at {shape}: error {found:.3g} is over {SAME:.3g}: no time is reported")


def attempt(report: Report, what: object, device: torch.device, work: Callable[..., None], *arguments: Any) -> bool:
    """Run a part of a stage and say whether it succeeded; the next one starts with memory freed in any case."""
    fault = None
    try:
        work(*arguments)
    except Exception as reason:  # out of memory, a wrong result, a kernel's fault: the stage goes on
        fault = f"{type(reason).__name__}: {first_line(reason)}"
        report({"case": str(what), "fault": fault})
    timing.release(device)
    return fault is None


def first_line(reason: Exception) -> str:
    return str(reason).partition("\n")[0]


def _report_turns(taken: Mapping[str, list[float]], key: str, ratio: str, shape: str, report: Report) -> None:
    """Rows ``key/who/shape`` of contenders timed in turns, and ``ratio/…``: how much longer each takes than ours."""
    for name, seconds in taken.items():
        report(spread(seconds).row(f"{key}/{name}/{shape}"))
        if name != "ours":
            value = round(pair_ratio(seconds, taken["ours"]), 3)
            report({"key": f"ratio/{ratio}/{name}/{shape}", "value": value, "unit": "x"})


def ceilings(settings: Settings, report: Report) -> None:
    """Stage: what this device copies and multiplies at, in this run."""
    clock = Clock(settings.torch_device)
    size, side = (1 << 20, 128) if settings.quick else (4 << 30, 8192)
    copied = timing.copy(clock, size)
    report(copied.row("copy ms") | {"case": f"copy of {size:,} bytes"})
    report({"key": "copy", "value": 2 * size / (1e-3 * copied.median), "unit": "bytes read and written a second"})
    multiplied = timing.product(clock, side, DTYPE)
    report(multiplied.row("product ms") | {"case": f"{side}³ {DTYPE} product"})
    report({"key": "product", "value": 2 * side**3 / (1e-3 * multiplied.median), "unit": "FLOPs a second"})
    if settings.device == "cuda":
        report({"case": "clocks just after", "clocks": clocks()})


def kernels(settings: Settings, report: Report) -> None:
    """Stage: the stages of a layer one by one, forward and backward, and one product of the tree's FLOPs."""
    device, clock = settings.torch_device, Clock(settings.torch_device)

    def warm(shape: Shape) -> None:
        Layer(shape, settings).check(report, "ours")
        for _, work in stage_works(shape, settings):
            work()

    def one(shape: Shape) -> None:
        works = dict(stage_works(shape, settings))
        for name, seconds in take_turns(works, clock, 1.5 * settings.turn_seconds).items():
            report(spread(seconds).row(f"kernel/{name}/{shape.name}"))

    shapes = [s for s in shapes_of(settings).values() if timing.free_bytes(device) > 2 * our_peak_bytes(s)]
    # Every shape is warm, and right, before the first is timed.
    for shape in [s for s in shapes if attempt(report, f"stages at {s}", device, warm, s)]:
        attempt(report, f"stages at {shape}", device, one, shape)


def stage_works(shape: Shape, settings: Settings) -> Iterator[tuple[str, Work]]:
    """Name and work of every stage and direction of `shapes.STAGES`, and of the product to compare with."""
    device, m, size, tokens = settings.torch_device, shape.bank, shape.embedding, shape.tokens
    package = "python_ref" if settings.backend == "reference" else "lmn_kernels._triton"
    tree, attention = (importlib.import_module(f"{package}.{name}") for name in ("tree", "attention"))
    layer = LogarithmicMixing(size, shape.heads, m, init="variance_preserving", dtype=DTYPE, device=device)
    assert isinstance(layer.summarizer, Summarizer)
    merge = layer.summarizer.requires_grad_(False).merge()
    layout = make_layout(Sequences.equal(shape.batch, shape.length), 0, device)
    x = _randn(tokens, size, device=device)
    nodes = tree.build_tree(x, merge, m, None, None, layout)
    grad_nodes = torch.randn_like(nodes)
    yield "tree forward", lambda: tree.build_tree(x, merge, m, None, None, layout)
    yield "tree backward", lambda: tree.build_tree_backward(grad_nodes, x, nodes, merge, None, layout)
    left, right = _randn(m * tokens, 2 * size, device=device), _randn(2 * size, size, device=device)
    product = _randn(m * tokens, size, device=device)
    yield "product", lambda: torch.mm(left, right, out=product)

    def project() -> tuple[Tensor, Tensor]:
        return layer.sva.token_qkv(tokens_in), layer.sva.node_qv(nodes_in)

    def without_graph(work: Callable[[], object]) -> Work:
        def run() -> object:
            with torch.no_grad():
                return work()

        return run

    tokens_in, nodes_in = x.clone().requires_grad_(), nodes.clone().requires_grad_()
    token_qkv, node_qv = project()
    leaves = [tokens_in, nodes_in, *(p for n, p in layer.sva.named_parameters() if "out" not in n)]
    up = [torch.randn_like(token_qkv), torch.randn_like(node_qv)]
    yield "project forward", without_graph(project)
    yield "project backward", lambda: torch.autograd.grad([token_qkv, node_qv], leaves, up, retain_graph=True)
    qkv, qv = token_qkv.detach(), node_qv.detach()
    out, lse = attention.attend(qkv, qv, shape.heads, layout)
    yield "attend forward", lambda: attention.attend(qkv, qv, shape.heads, layout)
    yield "attend backward", lambda: attention.attend_backward(x, qkv, qv, out, lse, shape.heads, layout)
    mixed = out.clone().requires_grad_()
    y = layer.sva.out_proj(mixed)
    yield "out forward", without_graph(lambda: layer.sva.out_proj(mixed))
    leaves_out = [mixed, *layer.sva.out_proj.parameters()]
    yield "out backward", lambda: torch.autograd.grad(y, leaves_out, x, retain_graph=True)


def layers(settings: Settings, report: Report) -> None:
    """Stage: whole layers against the materialising form, time and peak memory."""
    device, clock = settings.torch_device, Clock(settings.torch_device)

    def one(shape: Shape, naive: bool) -> None:
        before = timing.allocated(device)
        this = Layer(shape, settings)
        this.check(report, "ours", *(["naive"] if naive else []))
        names = ["ours", "lean", *(["naive"] if naive else [])]
        for name in names:
            peak = timing.peak_bytes(this.work(TRAINING, name), before, device)
            if peak is not None:
                report({"key": f"memory/{name}/{shape.name}", "value": peak, "unit": "bytes"})
        for what in (FORWARD, TRAINING):
            works = {name: this.work(what, name) for name in names if (what, name) != (FORWARD, "lean")}
            taken = take_turns(works, clock, settings.turn_seconds)
            _report_turns(taken, what, what, shape.name, report)

    def with_or_without(shape: Shape) -> None:
        naive = shape.name != "M" and timing.free_bytes(device) > naive_peak_bytes(shape) * 1.1
        reason = f"needs {naive_peak_bytes(shape) / 1e9:.1f} GB"
        if naive:
            try:
                one(shape, True)
                return
            except torch.OutOfMemoryError:
                reason = "out of memory"
        report({"case": f"naive at {shape}", "skipped": reason})
        timing.release(device)
        one(shape, False)

    for shape in shapes_of(settings).values():
        attempt(report, shape, device, with_or_without, shape)


def backends(settings: Settings) -> dict[str, SDPBackend]:
    if settings.device == "cuda":
        return {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
    return {"math": SDPBackend.MATH}


def linear_peers(shape: Shape, settings: Settings, directions: tuple[str, ...], report: Report) -> Comparison:
    """The layers of flash-linear-attention beside one of ours, checked; what cannot run is reported."""
    limits = Limits(seconds=10, budget=settings.turn_seconds)
    peers = Comparison(
        "layer", shape, DTYPE, settings.torch_device, tuple(KINDS), directions, limits, settings.quick, settings.backend
    )
    peers.check()
    for (name, direction), reason in peers.gaps.items():
        report({"case": f"{name} at {shape}, {direction}", "skipped": reason})
    return peers


def attention(settings: Settings, report: Report) -> None:
    """Stage: the layer against causal attention, its implementation forced by name, and against linear attention."""
    device, clock = settings.torch_device, Clock(settings.torch_device)

    def one(shape: Shape, keys: dict[str, str], linear: bool) -> None:
        this = Layer(shape, settings)
        this.check(report, "ours")
        names = ["ours"]
        for name in backends(settings):
            try:
                this.form(name).call()
                names.append(name)
            except RuntimeError as reason:
                report({"case": f"{name} at {shape}", "skipped": first_line(reason)})
        peers = linear_peers(shape, settings, tuple(keys), report) if linear else None
        for what, key in keys.items():
            works = {name: this.work(what, name) for name in names} | (peers.works(what) if peers else {})
            taken = take_turns(works, clock, settings.turn_seconds)
            _report_turns(taken, key, what if key != "crossover" else key, shape.name, report)

    for name in "ACD":
        shape = shapes_of(settings)[name]
        beside = {what: f"beside attention, {what}" for what in (FORWARD, TRAINING)}
        attempt(report, shape, device, one, shape, beside, True)
    for shape in QUICK_CROSSOVER if settings.quick else CROSSOVER:
        attempt(report, shape, device, one, shape, {TRAINING: "crossover"}, False)


def small(settings: Settings, report: Report) -> None:
    """Stage: shape P, where launches cost more than work: calls in a row, and CUDA graphs replayed."""
    device, shape = settings.torch_device, shapes_of(settings)["P"]
    # Half a megabyte of activations lives in the cache in any case.
    clock = Clock(device, flush=False)
    this = Layer(shape, settings)
    this.check(report, "ours", "naive")
    works = {name: this.work(TRAINING, name) for name in ("ours", "naive")}

    def one(what: str, wrap: Callable[[Work], Work]) -> None:
        calls = 2 if settings.quick else 20
        taken = take_turns({name: wrap(work) for name, work in works.items()}, clock, settings.turn_seconds, calls)
        _report_turns(taken, what, what, shape.name, report)

    attempt(report, f"eager at {shape}", device, one, "eager", lambda work: work)
    attempt(report, f"graph at {shape}", device, one, "graph", lambda work: timing.graphed(work, device))


def scaling(settings: Settings, report: Report) -> None:
    """Stage: training at E = 512 from 8k to 1M tokens in one sequence."""
    device, clock = settings.torch_device, Clock(settings.torch_device)

    def warm(shape: Shape) -> None:
        this = Layer(shape, settings)
        this.check(report, "ours")
        this.work(TRAINING, "ours")()

    def one(shape: Shape) -> None:
        this = Layer(shape, settings)
        taken = take_turns({"ours": this.work(TRAINING, "ours")}, clock, settings.turn_seconds)
        _report_turns(taken, "scaling", "scaling", shape.name, report)

    shapes = QUICK_SCALING if settings.quick else SCALING
    shapes = [shape for shape in shapes if timing.free_bytes(device) > 1.5 * our_peak_bytes(shape)]
    for shape in [shape for shape in shapes if attempt(report, f"L = {shape.name}", device, warm, shape)]:
        attempt(report, f"L = {shape.name}", device, one, shape)


def compiled(settings: Settings, report: Report) -> None:
    """Stage: the materialising form under torch.compile at C."""
    shape = shapes_of(settings)["C"]
    # Off a GPU the compiler proper takes longer than the whole rehearsal.
    options: dict[str, Any] = {"mode": settings.compile_mode} if settings.device == "cuda" else {"backend": "aot_eager"}
    mix = torch.compile(materialized.mix, fullgraph=True, dynamic=False, **options)
    this = Layer(shape, settings)
    this.check(report, "ours", "naive")
    form = Form(functools.partial(materialized_layer, this.problem, mix), this.problem.leaves())
    works = {
        "ours": this.work(TRAINING, "ours"),
        "compiled": direction_work(form, TRAINING, this.problem, REGISTRY["layer"]["materialised"]),
    }
    begin = time.monotonic()
    works["compiled"]()
    report({"case": "compilation", "seconds": round(time.monotonic() - begin, 1), "options": str(options)})
    with torch.no_grad():
        found = error(cast(Tensor, form.call()), cast(Tensor, this.form("naive").call()))
    if not found <= SAME:
        raise ValueError(f"compiled at {shape}: error {found:.3g} is over {SAME:.3g}: no time is reported")
    taken = take_turns(works, Clock(settings.torch_device), settings.turn_seconds)
    _report_turns(taken, "beside compiled", "training", shape.name, report)
