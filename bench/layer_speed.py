"""Mixing layer against the materialising form on the CPU: time, and bytes saved for backward.

    python -m bench.layer_speed [--quick] [--out FILE]

Both forms run in one process on the same weights, interleaved; the table gives medians with the 20th
and 80th percentile, and the ratio as the median over pairs. A pair whose results disagree stops the run.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from bench import materialized
from bench.checkpoint import write_file
from lmn_kernels import LogarithmicMixing
from lmn_kernels.summarizers import Summarizer

# batch, length, embedding, heads, bank
Shape = tuple[int, int, int, int, int]
SHAPES: list[Shape] = [(1, 4096, 256, 4, 1), (16, 512, 32, 4, 2)]
QUICK_SHAPES: list[Shape] = [(1, 1024, 128, 4, 1), (4, 256, 32, 4, 2)]
WARM_UP = 2


@dataclass
class Row:
    """One line of the table; a time is (median, 20th, 80th percentile)."""

    what: str
    shape: Shape
    unit: str
    ours: list[float]
    materialized: list[float]
    ratio: float


def saved_bytes(run: Callable[[], torch.Tensor]) -> int:
    """Bytes that ``run`` keeps for backward: distinct storages, parameters aside (copies and views count)."""
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, torch.nn.Parameter):
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = run()
    total = sum(kept.values())
    del y
    return total


def _timed(work: Callable[[Callable[[], torch.Tensor]], None], form: Callable[[], torch.Tensor]) -> float:
    start = time.perf_counter()
    work(form)
    return time.perf_counter() - start


def _spread(seconds: list[float]) -> list[float]:
    low, *_, high = statistics.quantiles(seconds, n=5)
    return [round(1e3 * value, 2) for value in (statistics.median(seconds), low, high)]


def compare(shape: Shape, repeats: int, bar: tqdm) -> list[Row]:
    """Forward, forward+backward and saved bytes of both forms at one shape."""
    batch, length, embedding, heads, bank = shape
    torch.manual_seed(0)
    layer = LogarithmicMixing(embedding, heads, bank, init="variance_preserving", backend="reference")
    summarizer = layer.summarizer
    assert isinstance(summarizer, Summarizer)
    weights: dict[str, torch.Tensor] = dict(layer.sva.named_parameters())
    x = torch.randn(batch, length, embedding, requires_grad=True)
    cotangent = torch.randn_like(x)
    leaves = [x, *layer.parameters()]

    def ours() -> torch.Tensor:
        return layer(x)

    def naive() -> torch.Tensor:
        return materialized.mix(x, summarizer.weight, summarizer.bias, weights, heads)

    with torch.no_grad():
        expected = naive()
        difference, scale = (ours() - expected).abs().max().item(), expected.abs().max().item()
    if difference > 1e-4 * scale:
        sys.exit(f"the forms disagree at {shape}: {difference:.3g} of {scale:.3g}; no time is reported")

    def forward(form: Callable[[], torch.Tensor]) -> None:
        with torch.no_grad():
            form()

    def training(form: Callable[[], torch.Tensor]) -> None:
        torch.autograd.grad(form(), leaves, cotangent)

    rows = []
    for what, work in (("forward", forward), ("forward+backward", training)):
        fast, slow = [], []
        for repeat in range(WARM_UP + repeats):
            pair = _timed(work, ours), _timed(work, naive)
            if repeat >= WARM_UP:
                fast.append(pair[0])
                slow.append(pair[1])
            bar.update()
        ratio = statistics.median(b / a for a, b in zip(fast, slow, strict=True))
        rows.append(Row(what, shape, "ms", _spread(fast), _spread(slow), round(ratio, 2)))
    kept, kept_naive = saved_bytes(ours) / 1e6, saved_bytes(naive) / 1e6
    ratio = round(kept_naive / kept, 2)
    rows.append(Row("saved for backward", shape, "MB", [round(kept, 2)], [round(kept_naive, 2)], ratio))
    return rows


def _cell(values: list[float], unit: str) -> str:
    spread = f" ({values[1]} to {values[2]})" if len(values) > 1 else ""
    return f"{values[0]}{spread} {unit}"


def machine() -> dict[str, object]:
    """Where and with what the numbers were taken."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    dirty = subprocess.run(["git", "status", "--porcelain", "-uno"], capture_output=True, text=True).stdout.strip()
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text().splitlines()
        model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), model)
    return {
        "commit": commit,
        "dirty": bool(dirty),
        "cpu": model,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=2, help="threads of torch")
    parser.add_argument("--repeats", type=int, default=15, help="timed pairs for each row")
    parser.add_argument("--quick", action="store_true", help="small shapes, a few seconds: a check that it runs")
    parser.add_argument("--out", type=Path, help="write the rows as JSON, whole or not at all")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    shapes = QUICK_SHAPES if options.quick else SHAPES
    repeats = 3 if options.quick else options.repeats
    rows = []
    with tqdm(total=len(shapes) * 2 * (WARM_UP + repeats), desc="layer_speed", disable=None) as bar:
        for shape in shapes:
            rows += compare(shape, repeats, bar)
    facts = machine()
    print(", ".join(f"{name} {value}" for name, value in facts.items()))
    print(f"{'(B, L, E, heads, m)':24} {'':20} {'ours':>28} {'materialised':>28} {'ratio':>7}")
    for row in rows:
        cells = [_cell(values, row.unit) for values in (row.ours, row.materialized)]
        print(f"{row.shape!s:24} {row.what:20} {cells[0]:>28} {cells[1]:>28} {row.ratio:>6}x")
    if options.out:
        stored = {"machine": facts, "rows": [asdict(row) for row in rows]}
        write_file(options.out, json.dumps(stored, indent=1).encode())


if __name__ == "__main__":
    main()
