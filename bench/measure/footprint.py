"""Memory of a piece of work: the peak of what it allocates, and what it keeps for backward."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._pytree import tree_leaves

from . import timing
from .journal import Row
from .timing import Work

# Its profiler otherwise reports every start and stop on stderr.
os.environ.setdefault("KINETO_LOG_LEVEL", "9")


def saved_bytes(run: Callable[[], Any]) -> int:
    """Bytes that ``run`` keeps for backward: distinct storages, parameters and views of them aside (copies count)."""
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor if tensor._base is None else tensor._base, torch.nn.Parameter):
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = run()
    total = sum(kept.values())
    del outputs
    return total


def peak_bytes(work: Work, device: torch.device) -> int:
    """Most bytes that ``work`` holds at a time, beyond what was there before; its result counts.

    On a GPU as PyTorch's allocator counts them. On a CPU from the profiler's record of every allocation and
    release by PyTorch's allocator: scratch memory that a library takes for itself is not in it.
    """
    if device.type == "cuda":
        timing.release(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        work()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        result = work()
        del result
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        recorded.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    changes = [(event["ts"], event["args"]["Bytes"]) for event in events if event.get("name") == "[memory]"]
    held = peak = 0
    for _, change in sorted(changes, key=lambda pair: pair[0]):
        held += change
        peak = max(peak, held)
    return peak


def footprint(work: Work, call: Callable[[], Any] | None, device: torch.device) -> Row:
    """``peak_bytes`` of ``work`` and, where ``call`` makes a graph, ``saved_bytes`` of it."""
    work()  # tables and cotangents that are made once
    row: Row = {"peak_bytes": peak_bytes(work, device)}
    if call is not None:
        row["saved_bytes"] = saved_bytes(call)
    return row


def tensor_bytes(tree: Any) -> int:
    """Bytes of the tensors in a structure."""
    return sum(leaf.nbytes for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor))
