"""Mixing layer against the materialising form on the CPU: time, and bytes saved for backward.

    python -m bench.layer_speed [--quick] [--out FILE]

Both forms run in one process on the same weights, interleaved; the table gives medians with the 20th
and 80th percentile, and the ratio as the median over pairs. A pair whose results disagree stops the run.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from tqdm import tqdm

from bench import materialized
from lmn_kernels import LogarithmicMixing

# batch, length, embedding, heads, bank
SHAPES = {
    "wide": (1, 4096, 256, 4, 1),
    "paper": (16, 512, 32, 4, 2),
}
QUICK_SHAPES = {
    "wide": (1, 1024, 128, 4, 1),
    "paper": (4, 256, 32, 4, 2),
}


def saved_bytes(run: Callable[[], torch.Tensor]) -> int:
    """Bytes that ``run`` keeps for backward: distinct storages, parameters aside."""
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


def _timed(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def compare(shape: tuple[int, int, int, int, int], repeats: int, bar: tqdm) -> list[dict[str, object]]:
    """Forward, forward+backward and saved bytes of both forms at one shape."""
    batch, length, embedding, heads, bank = shape
    torch.manual_seed(0)
    layer = LogarithmicMixing(embedding, heads, bank, init="variance_preserving", backend="reference")
    weights = dict(layer.sva.named_parameters())
    x = torch.randn(batch, length, embedding, requires_grad=True)
    cotangent = torch.randn_like(x)
    leaves = [x, *layer.parameters()]

    forms = {
        "ours": lambda: layer(x),
        "materialized": lambda: materialized.mix(x, layer.summarizer.weight, layer.summarizer.bias, weights, heads),
    }
    with torch.no_grad():
        difference = (forms["ours"]() - forms["materialized"]()).abs().max().item()
        scale = forms["ours"]().abs().max().item()
    if difference > 1e-4 * scale:
        sys.exit(f"the forms disagree at {shape}: {difference:.3g} of {scale:.3g}; no time is reported")

    def forward(form: Callable[[], torch.Tensor]) -> None:
        with torch.no_grad():
            form()

    def training(form: Callable[[], torch.Tensor]) -> None:
        torch.autograd.grad(form(), leaves, cotangent)

    rows = []
    for name, work in (("forward", forward), ("forward+backward", training)):
        seconds: dict[str, list[float]] = {form: [] for form in forms}
        for repeat in range(repeats + 2):
            for form, run in forms.items():
                elapsed = _timed(lambda work=work, run=run: work(run))
                if repeat >= 2:
                    seconds[form].append(elapsed)
            bar.update()
        ratios = [slow / fast for slow, fast in zip(seconds["materialized"], seconds["ours"], strict=True)]
        row: dict[str, object] = {"what": name, "shape": shape, "unit": "ms"}
        for form in forms:
            low, *_, high = statistics.quantiles(seconds[form], n=5)
            median = statistics.median(seconds[form])
            row[form] = [round(1e3 * value, 2) for value in (median, low, high)]
        row["ratio"] = round(statistics.median(ratios), 2)
        rows.append(row)
    kept = {form: saved_bytes(run) for form, run in forms.items()}
    row = {"what": "saved for backward", "shape": shape, "unit": "MB", "ratio": round(kept["materialized"] / kept["ours"], 2)}
    row.update({form: [round(size / 1e6, 2)] for form, size in kept.items()})
    rows.append(row)
    return rows


def machine() -> dict[str, object]:
    """Where and with what the numbers were taken."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    dirty = subprocess.run(["git", "status", "--porcelain", "-uno"], capture_output=True, text=True).stdout.strip()
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        model = names[0] if names else model
    return {
        "commit": commit,
        "dirty": bool(dirty),
        "cpu": model,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--threads", type=int, default=2, help="threads of torch")
    parser.add_argument("--repeats", type=int, default=15, help="timed pairs for each row")
    parser.add_argument("--quick", action="store_true", help="small shapes, a few seconds: a check that it runs")
    parser.add_argument("--out", type=Path, help="write the rows as JSON, whole or not at all")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    shapes = QUICK_SHAPES if options.quick else SHAPES
    repeats = 3 if options.quick else options.repeats
    rows = []
    with tqdm(total=len(shapes) * 2 * (repeats + 2), desc="layer_speed", disable=None) as bar:
        for shape in shapes.values():
            rows += compare(shape, repeats, bar)
    facts = machine()
    print(", ".join(f"{name} {value}" for name, value in facts.items()))
    print(f"{'(B, L, E, heads, m)':24} {'':20} {'ours':>24} {'materialised':>24} {'ratio':>7}")
    for row in rows:
        cells = []
        for form in ("ours", "materialized"):
            values = row[form]
            spread = f" ({values[1]}–{values[2]})" if len(values) > 1 else ""
            cells.append(f"{values[0]}{spread} {row['unit']}")
        print(f"{row['shape']!s:24} {row['what']:20} {cells[0]:>24} {cells[1]:>24} {row['ratio']:>6}×")
    if options.out:
        handle, temporary = tempfile.mkstemp(dir=options.out.parent, suffix=".tmp")
        with os.fdopen(handle, "w") as file:
            json.dump({"machine": facts, "rows": rows}, file, indent=1)
        os.replace(temporary, options.out)


if __name__ == "__main__":
    main()
