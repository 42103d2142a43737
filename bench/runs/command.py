"""``python -m bench RUN``: every measurement of the project, and the report made from them.

A run appends its rows to ``bench/results/RUN.jsonl`` as they come. Ctrl-C loses at most the case that is being
measured; the same command goes on behind the last one. Nothing is ever installed: a contender that is not there is a
named gap in the table.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path
from typing import Any, cast

import torch

from bench.contenders import look_ahead
from bench.contenders.providers import PROBLEMS, REGISTRY
from bench.errors import InputError, RunError, first_line
from bench.extras import need
from bench.measure.runner import Context, Run, execute
from bench.report import report
from lmn_kernels import BackendError
from lmn_kernels.backend.choice import BACKENDS, check_name, why_not

RUNS = (
    "kernels", "decode", "scaling", "crossover", "memory", "paper-table1", "paper-fig9", "paper-fig10", "recall",
    "agreement", "lamemo", "lamemo-training",
)  # fmt: skip
RESULTS, QUICK_RESULTS, SCRATCH = Path("bench/results"), Path("runs/bench/quick"), Path("runs/bench")
_GENERAL = ("run", "quick", "rehearse", "device", "results", "scratch", "fresh", "only", "commit", "dtype", "backend")


def load(name: str) -> Run:
    """The module of a run."""
    return cast(Run, importlib.import_module(f"bench.runs.{name.replace('-', '_')}"))


def parser() -> argparse.ArgumentParser:
    summary, _, details = (__doc__ or "").partition("\n\n")
    result = argparse.ArgumentParser(
        prog="python -m bench",
        description=summary.replace("``", ""),
        epilog=details.replace("``", ""),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    runs = result.add_subparsers(dest="run", required=True, metavar="RUN")
    for name in RUNS:
        module = load(name)
        one = runs.add_parser(name, help=first_line(module.__doc__), description=module.__doc__)
        _general(one)
        module.add_arguments(one.add_argument_group("this run").add_argument)
    made = runs.add_parser("report", help=first_line(report.__doc__), description=report.__doc__)
    made.add_argument("--results", type=Path, default=RESULTS, help="folder of the rows (default: %(default)s)")
    made.add_argument("--readme", type=Path, default=Path("README.md"), help="whose marked block is replaced")
    made.add_argument("--plots", type=Path, help="folder of the pictures (default: plots/ in --results)")
    listed = runs.add_parser("list", help="Who can run here, and why the others cannot.")
    listed.add_argument("--device", default="auto")
    return result


def _general(one: argparse.ArgumentParser) -> None:
    add = one.add_argument
    add("--quick", action="store_true", help="small, under two minutes: a check that it runs")
    add("--rehearse", action="store_true", help="with the cases of a GPU, tiny, on whatever device there is")
    add("--device", default="auto", help="auto (default), cpu or cuda")
    add("--dtype", choices=("float32", "bfloat16", "float16"), help="default: bfloat16 on a GPU, float32 elsewhere")
    add("--backend", choices=BACKENDS[1:], help="of our own path; default: triton on a GPU, else cpp where built")
    add("--threads", type=int, help="CPU threads (default: torch's choice)")
    add("--only", nargs="+", metavar="TEXT", help="of the missing cases those whose name holds one of these")
    add("--fresh", action="store_true", help="begin anew where an interrupted run could go on")
    add("--commit", help="of this code, to record where the checkout is no git repository")
    add("--results", type=Path, help=f"folder of the rows (default: {RESULTS}; with --quick {QUICK_RESULTS})")
    add("--scratch", type=Path, help=f"folder of checkpoints (default: {SCRATCH}/RUN)")


def context(given: argparse.Namespace) -> Context:
    """What the command line means.

    Raises:
        InputError: a value cannot be used.
    """
    device = _device(given.device)
    if device.type not in ("cpu", "cuda"):
        # Nothing here waits for another kind of device before it reads the clock.
        raise InputError(f"device: expected cpu or cuda, got {given.device!r}")
    if given.threads is not None:
        if given.threads < 1:
            raise InputError(f"threads: expected at least 1, got {given.threads}")
        torch.set_num_threads(given.threads)
    on_gpu = device.type == "cuda"
    dtype = given.dtype or ("bfloat16" if on_gpu else "float32")
    scratch = (given.scratch or SCRATCH) / given.run
    quick = given.quick or given.rehearse
    return Context(
        device=device,
        dtype=getattr(torch, dtype),
        backend=_backend(given.backend, given.run, device, getattr(torch, dtype)),
        quick=quick,
        results=given.results or (QUICK_RESULTS if quick else RESULTS),
        scratch=scratch / "quick" if quick else scratch,
        options={name: value for name, value in vars(given).items() if name not in _GENERAL},
        rehearsed=given.rehearse,
        commit=given.commit,
    )


def _backend(asked: str | None, run: str, device: torch.device, dtype: torch.dtype) -> str:
    """Of our own path, by name: the one asked for, or what serves it on such a device.

    Raises:
        InputError: the run's operations have no such backend.
    """
    operation = "look_ahead_attend" if run in ("lamemo", "lamemo-training") else "attend"
    if asked is None:
        return "triton" if device.type == "cuda" else "reference" if why_not("cpp", operation, device, dtype) else "cpp"
    try:
        check_name(asked, "backend", operation)
    except ValueError as error:
        raise InputError(str(error)) from error
    return asked


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device: expected one of this machine's, got {name!r} ({first_line(error)})") from error
    return device


def providers(device: torch.device) -> str:
    """A line for every operation and provider."""
    lines = []
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    for operation, found in REGISTRY.items():
        kind = PROBLEMS[operation]
        problem = kind(operation, kind.example, dtype, device, "reference")
        problem.backend = _backend(None, "lamemo" if operation in look_ahead.OPERATIONS else "kernels", device, dtype)
        for name, provider in found.items():
            reason, training = provider.missing(problem), provider.no_training(problem)
            said = reason or (f"forward only: {training}" if training else "here")
            lines.append(f"{operation:20} {name:24} {said}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status: 0, 1 (a run failed), 2 (bad input), 130 (Ctrl-C)."""
    given = parser().parse_args(argv)
    try:
        if given.run == "list":
            print(providers(_device(given.device)))
        elif given.run == "report":
            need("matplotlib", "tabulate")
            report.report(given.results, given.readme, given.plots or given.results / "plots")
        else:
            _measure(given)
        return 0
    except (InputError, BackendError) as error:
        return _complain(str(error), 2)
    except RunError as error:
        return _complain(str(error), 1)
    except KeyboardInterrupt:
        return _complain("interrupted; what was measured is kept, the same command goes on from there", 130)


def _measure(given: argparse.Namespace) -> None:
    need("numpy", "tabulate", "tqdm")
    chosen, module = context(given), load(given.run)
    journal = execute(given.run, module, chosen, given.fresh, given.only)
    print(f"{chosen.device}, {torch.get_num_threads()} threads, torch {torch.__version__}: {journal.path}")
    print(module.show(journal.rows))


def _complain(message: Any, status: int) -> int:
    print(f"bench: {message}", file=sys.stderr)
    return status
