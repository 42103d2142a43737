"""The gate of the GPU check, what it computes itself: layers, poison, determinism, sizes past 32 bits."""

from __future__ import annotations

import importlib
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.close import TOLERANCE, assert_close, error
from lmn_kernels import LogarithmicMixing, Sequences, attend, build_tree

from .configs import DTYPES, cast, layout_of, merge_of
from .stage import Report, Row, Settings, Skipped, case

KINDS: dict[str, dict[str, Any]] = {
    "linear": {},
    "expander": {"expand": 1},
    "conv_mixed": {"summarizer": "conv_mixed"},
    "depthwise_separable": {"summarizer": "depthwise_separable"},
}
FORMS = ("plain", "padded", "packed", "continued", "lean", "step")
HEADS, BANK = 4, 2


class Trial:
    """One layer three times: in the dtype under test, on the reference in that dtype, and there in float64."""

    def __init__(self, kind: str, size: int, dtype: torch.dtype, settings: Settings):
        device = settings.torch_device
        options: dict[str, Any] = {"init": "variance_preserving", "device": device, **KINDS[kind]}
        self.layer = LogarithmicMixing(size, HEADS, BANK, backend=settings.backend, dtype=dtype, **options)
        self.same = LogarithmicMixing(size, HEADS, BANK, backend="reference", dtype=dtype, **options)
        self.exact = LogarithmicMixing(size, HEADS, BANK, backend="reference", dtype=torch.float64, **options)
        for other in (self.same, self.exact):
            other.load_state_dict(self.layer.state_dict())
        length = 20 if settings.quick else 200
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
            first, state = layer.prefill(x[:, :-4])
            rows = [first]
            for t in range(x.shape[1] - 4, x.shape[1]):
                y, state = layer.step(x[:, t : t + 1], state)
                rows.append(y)
            return torch.cat(rows, 1)
        return layer(x)

    def run(self, layer: LogarithmicMixing, form: str) -> list[Tensor]:
        """The output, and the gradients of x and of every parameter."""
        x = self.x.to(next(layer.parameters()).dtype).detach()
        padding = self.padding(form)
        if padding is not None:
            x = x.masked_fill(padding[..., None], float("nan"))
        x.requires_grad_()
        y = self.output(layer, form, x)
        return [y.detach(), *torch.autograd.grad(y, [x, *layer.parameters()], self.cotangent.to(y.dtype))]


def _judge(trial: Trial, form: str, dtype: torch.dtype) -> Row:
    """Errors of the output and of the worst gradient against float64, and how often they pass twice the reference's.

    A tensor fails where its error is over the tolerance of its dtype, unless the reference in that dtype is
    at least half as wrong; and over ten tolerances in any case: products in TF32 would be.
    """
    layer = trial.layer
    if form == "step" and layer.backend != "reference":
        # No kernels step yet: "auto" takes what there is.
        layer.backend = "auto"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        runs = [trial.run(part, form) for part in (layer, trial.same, trial.exact)]
    names = ["y", "x", *(name for name, _ in layer.named_parameters())]
    largest = max(t.square().mean().sqrt().item() for t in runs[2][1:])
    row: Row = {"over_twice_reference": 0}
    for index, (name, got, same, exact) in enumerate(zip(names, *runs, strict=True)):
        assert torch.isfinite(got).all(), f"{name}: not finite"
        vanishes = exact.square().mean().sqrt().item() < 1e-12 * largest
        ours, theirs = (t.abs().max().item() / largest if vanishes else error(t, exact) for t in (got, same))
        over = ours > 2 * theirs + 1e-6
        row["over_twice_reference"] += over
        part = "y" if index == 0 else "gradients"
        row[part] = max(row.get(part, 0.0), ours)
        bar = TOLERANCE[dtype][min(index, 1)]
        fine = ours <= bar or (not over and ours <= 10 * bar)
        assert fine, f"{name}: error {ours:.3g} is over {bar:.3g}, that of the reference is {theirs:.3g}"
    padding = trial.padding(form)
    if padding is not None:
        assert not runs[0][0][padding].any() and not runs[0][1][padding].any(), "padding is not exactly 0"
    return row


def layers(settings: Settings, report: Report) -> None:
    """Stage: the layer in every form, kind and dtype against float64; a side stream against the default one."""
    size, wide = (16, 24) if settings.quick else (64, 256)
    cases = [(kind, size, dtype, form) for kind in KINDS for dtype in DTYPES for form in FORMS]
    cases += [("linear", wide, dtype, form) for dtype in DTYPES for form in FORMS]
    if settings.quick:
        cases = [c for c in cases if c[2] == torch.float32 and c[1] == size or c[1:3] == (wide, torch.bfloat16)]
    for kind, size, dtype, form in settings.mine(cases):
        with case(report, f"{kind} E={size} {str(dtype).removeprefix('torch.')} {form}") as row:
            torch.manual_seed(0)
            row |= _judge(Trial(kind, size, dtype, settings), form, dtype)
    if settings.device != "cuda":
        return
    for size in settings.mine([64, 256]):
        with case(report, f"side stream E={size}") as row:
            _side_stream(Trial("linear", size, torch.float32, settings))


def _side_stream(trial: Trial) -> None:
    """A launch on another stream than the current one would read x before it is there (R11)."""
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


@contextmanager
def filled(fill: bool) -> Iterator[None]:
    """Deterministic algorithms, with ``torch.empty`` full of NaN or as it comes."""
    flags: Any = torch.utils.deterministic
    before = flags.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    flags.fill_uninitialized_memory = fill
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
        flags.fill_uninitialized_memory = before


def poison(settings: Settings, report: Report) -> None:
    """Stage: results under poisoned allocations are those under any others, to the bit (R7)."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    sizes = (16,) if settings.quick else (64, 256)
    cases = [("linear", size, dtype, form) for size in sizes for dtype in DTYPES for form in FORMS[:5]]
    cases += [("expander", sizes[0], torch.float32, form) for form in FORMS[:5]]
    for kind, size, dtype, form in settings.mine(cases):
        with case(report, f"{kind} E={size} {str(dtype).removeprefix('torch.')} {form}"):
            torch.manual_seed(0)
            trial = Trial(kind, size, dtype, settings)
            with filled(False):
                plain = trial.run(trial.layer, form)
            with filled(True):
                poisoned = trial.run(trial.layer, form)
            for name, a, b in zip(["y", "x", *dict(trial.layer.named_parameters())], plain, poisoned, strict=True):
                assert torch.isfinite(b).all(), f"{name}: not finite under poison"
                assert torch.equal(a, b), f"{name}: changes under poison"


def determinism(settings: Settings, report: Report) -> None:
    """Stage: 20 forward and backward passes, equal to the bit without any flag (R15)."""
    sizes, length = ((16,), 40) if settings.quick else ((64, 256), 4000)
    for size, dtype in [(size, dtype) for size in sizes for dtype in DTYPES]:
        with case(report, f"E={size} {str(dtype).removeprefix('torch.')}") as row:
            torch.manual_seed(0)
            layer = LogarithmicMixing(
                size, HEADS, BANK, init="variance_preserving",
                backend=settings.backend, dtype=dtype, device=settings.torch_device,
            )  # fmt: skip
            x = torch.randn(2, length, size, device=settings.torch_device).to(dtype).requires_grad_()
            cotangent = torch.randn_like(x)
            first: list[Tensor] = []
            row["runs"] = 20
            for number in range(row["runs"]):
                y = layer(x)
                found = [y.detach(), *torch.autograd.grad(y, [x, *layer.parameters()], cotangent)]
                first = first or found
                same = all(torch.equal(f, s) for f, s in zip(found, first, strict=True))
                assert same, f"run {number + 1} differs from the first"


def large(settings: Settings, report: Report) -> None:
    """Stage: tensors of more than 2^31 elements, and more sequences than a grid's second axis holds (R4, R5)."""
    device = settings.torch_device
    attention, tree = (importlib.import_module(f"{_package(settings)}.{name}") for name in ("attention", "tree"))
    if settings.device == "cuda" and torch.cuda.mem_get_info(0)[0] < 60e9 and not settings.quick:
        raise Skipped("tensors of 2^31 elements and their gradients need 60 GB of free memory")
    count, length, size = (3, 16, 16) if settings.quick else (263, 8192, 1024)
    dtype = torch.bfloat16

    def last_of_many(whole: Callable[[Sequences], tuple[Tensor, Tensor]], alone: tuple[Tensor, Tensor]) -> None:
        for name, part, expected in zip(("out", "gradient"), whole(Sequences.equal(count, length)), alone, strict=True):
            assert_close(name, part[-length:].double(), expected.double(), TOLERANCE[dtype][1])

    with case(report, f"tree, x of {count * length * size:,} elements") as row:
        merge = cast(merge_of("linear", size, 1, device), dtype)
        x = torch.randn(count * length, size, dtype=dtype, device=device)

        def grown(sequences: Sequences) -> tuple[Tensor, Tensor]:
            layout, rows = layout_of(sequences, 0, device), x[-sequences.tokens :]
            nodes = tree.build_tree(rows, merge, 1, None, None, layout)
            level = nodes[0, layout.level_rows[1]].repeat_interleave(2, 0)
            return level, tree.build_tree_backward(nodes, rows, nodes, merge, None, layout)[0]

        last_of_many(grown, grown(Sequences.equal(1, length)))
        row["elements"] = x.numel()
    x = torch.empty(0)
    count = 3 if settings.quick else 88
    with case(report, f"attend, q, k and v of {count * length * 3 * size:,} elements") as row:
        token_qkv = torch.randn(count * length, 3 * size, dtype=dtype, device=device)
        node_qv = torch.randn(1, count * length + 1, 2 * size, dtype=dtype, device=device)

        def attended(sequences: Sequences, nodes: Tensor) -> tuple[Tensor, Tensor]:
            layout, rows = layout_of(sequences, 0, device), token_qkv[-sequences.tokens :]
            out, lse = attention.attend(rows, nodes, 16 if size > 16 else 2, layout)
            heads = lse.shape[1]
            return out, attention.attend_backward(out, rows, nodes, out, lse, heads, layout)[0]

        layout = layout_of(Sequences.equal(count, length), 0, device)
        own = layout_of(Sequences.equal(1, length), 0, device)
        nodes = torch.zeros(1, own.rows, 2 * size, dtype=dtype, device=device)
        for level in range(1, own.levels + 1):
            nodes[:, own.level_rows[level]] = node_qv[:, layout.level_rows[level]][:, -own.level_nodes[level] :]
        alone = attended(Sequences.equal(1, length), nodes)
        last_of_many(lambda sequences: attended(sequences, node_qv), alone)
        row["elements"] = token_qkv.numel()
    token_qkv = node_qv = torch.empty(0)
    for many in (6, 7) if settings.quick else (65536, 70001):
        for form in ("equal", "packed"):
            with case(report, f"{many} sequences, {form}"):
                _many(many, form, settings)


def _package(settings: Settings) -> str:
    return "python_ref" if settings.backend == "reference" else "lmn_kernels._triton"


def _many(many: int, form: str, settings: Settings) -> None:
    """A batch of that many short sequences equals its two halves: to the bit where kernels compute it."""
    device = settings.torch_device
    merge = merge_of("linear", 16, 1, device)
    x, cotangent = torch.randn(2, 3 * many, 16, device=device)

    def run(part: slice) -> tuple[Tensor, Tensor]:
        tokens = x[part].clone().requires_grad_()
        count = len(tokens) // 3
        bounds = 3 * torch.arange(count + 1, device=device)
        equal = form == "equal"
        sequences = Sequences.equal(count, 3) if equal else Sequences.packed(3 * count, bounds, max_length=3)
        nodes = build_tree(tokens, merge, sequences, backend=settings.backend)
        # No matrix product: those of the library may change with the number of rows.
        qkv, node_qv = torch.cat([tokens, 0.5 * tokens, 2 * tokens], 1), torch.cat([nodes, -nodes], 2)
        out, _ = attend(qkv, node_qv, 1, sequences, backend=settings.backend)
        return out.detach(), torch.autograd.grad(out, tokens, cotangent[part])[0]

    whole = run(slice(None))
    for part in (slice(many // 2 * 3), slice(many // 2 * 3, None)):
        for name, a, b in zip(("out", "gradient"), whole, run(part), strict=True):
            if settings.backend == "reference":
                assert_close(name, b, a[part], TOLERANCE[torch.float32][1])
            else:
                assert torch.equal(b, a[part]), f"{name} of {part} differs"


def small_runs(device: str) -> None:
    """What runs under compute-sanitizer: every kernel, forward and backward, and steps, on small shapes."""
    # Imported here, because that module needs this one.
    from .decode import small_steps
    from .look_ahead import small_segments

    settings = Settings(device, False, Path())
    small_steps(settings)
    small_segments(settings)
    for kind, size in [*((kind, 64) for kind in KINDS), ("linear", 256)]:
        for dtype in (torch.bfloat16, torch.float32):
            for form in FORMS[:5]:
                trial = Trial(kind, size, dtype, settings)
                trial.run(trial.layer, form)
    print("small runs done", flush=True)
