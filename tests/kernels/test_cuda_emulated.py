"""The CUDA kernels of csrc/cuda, compiled for the CPU by `tests/emulated_cuda`, against the float64 reference."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
COMPILER = shutil.which("g++")

pytestmark = [
    pytest.mark.ext,
    pytest.mark.slow,
    pytest.mark.skipif(COMPILER is None or sys.platform != "linux", reason="needs g++ on Linux"),
    pytest.mark.skipif(
        not Path(sysconfig.get_paths()["include"], "Python.h").exists(), reason="needs the headers of this Python"
    ),
]

# Runs where the package with the emulated extension is the first on the path.
CHECK = """
import sys
from dataclasses import replace

import torch

import lmn_kernels
from lmn_kernels import LogarithmicMemory, MemoryState, decode_, update_
from bench.close import TOLERANCE, assert_close
from tests.support.variants import VARIANTS, Variant

assert lmn_kernels.__file__.startswith(sys.argv[1]), lmn_kernels.__file__
torch.set_grad_enabled(False)
BFLOAT16, FLOAT32 = torch.bfloat16, torch.float32


def exact(layer, made):
    made.load_state_dict({name: value.double() for name, value in layer.state_dict().items()})
    return made


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.slots(), b.slots(), strict=True))


def filled(layer, positions, dtype):
    state = layer.init_state(len(positions), max_position=max(positions) + 64, dtype=dtype)
    nodes = torch.randn_like(state.nodes)
    q, v = layer.sva.node_qv(nodes.to(layer.sva.q.weight.dtype)).to(dtype).chunk(2, -1)
    made = (torch.tensor(positions), torch.randn_like(state.token), nodes, q.contiguous(), v.contiguous())
    return MemoryState(*made, state.expand, state.levels, max(positions))


def variants():
    # A tile of columns that is not full, more rows than a tile holds, and heads wider than a warp.
    mixed = Variant("mixed", 20, 4, 3, {"summarizer": "conv_mixed"})
    wide = [Variant("wide", 36, 3, 2), Variant("heads", 136, 1, 1), mixed]
    for variant in [v for v in VARIANTS if v.name not in ("module", "function", "expander_module")] + wide:
        few = variant.name in ("linear", "expander_k1", "mixed")
        narrow = ((BFLOAT16, FLOAT32), (BFLOAT16, BFLOAT16)) if few else ()
        for dtype, kept in ((FLOAT32, FLOAT32), *narrow):
            layer, batch, tokens = variant.layer(dtype=dtype), 5, 9
            x = torch.randn(batch, tokens, variant.embedding).to(dtype)
            state, alone = (layer.init_state(batch, max_position=tokens, dtype=kept) for _ in range(2))
            y = decode_(x, state, layer.step_weights(), backend="cpp")
            limit = TOLERANCE[dtype][0]
            assert_close(f"{variant} {dtype} {kept} y", y.float(), exact(layer, variant.layer())(x.double()), limit)
            reference = layer.init_state(batch, max_position=tokens, dtype=kept)
            decode_(x, reference, layer.step_weights(), backend="reference")
            for name in ("token", "nodes", "q", "v"):
                assert_close(f"{variant} {dtype} {kept} {name}", getattr(state, name), getattr(reference, name), limit)
            assert torch.equal(state.position, reference.position)
            singles = [decode_(token, alone, layer.step_weights(), backend="cpp") for token in x.split(1, 1)]
            assert torch.equal(torch.cat(singles, 1), y) and same(alone, state), f"{variant}: a run is not its tokens"


def slots():
    layer = VARIANTS[1].layer(dtype=FLOAT32)
    pool = filled(layer, [5, 6, 7, 0, 15, 2**31 - 1, 2**32 - 1, 40], FLOAT32)
    before, x, index = pool.clone(), torch.randn(7, 2, 12), torch.tensor([6, -1, 4, 3, 5, 1, -1])
    x[1] = torch.nan
    expected = pool.clone()
    want = decode_(x, expected, layer.step_weights(), slots=index, backend="reference")
    got = decode_(x, pool, layer.step_weights(), slots=index, backend="cpp")
    assert not got[[1, 6]].any()
    assert_close("y", got, want, TOLERANCE[FLOAT32][0])
    untouched = torch.tensor([0, 2, 7])
    assert same(pool.reorder(untouched), before.reorder(untouched))
    assert torch.equal(pool.position, expected.position)
    assert_close("nodes", pool.nodes, expected.nodes, TOLERANCE[FLOAT32][0])
    other = before.clone()
    update_(x, other, layer.step_weights(), slots=index, backend="cpp")
    assert same(other, pool)


def block():
    for mult in (0, 1, 4):
        layer = LogarithmicMemory(12, 3, 2, feedforward_mult=mult, init="variance_preserving")
        twin = exact(layer, LogarithmicMemory(12, 3, 2, feedforward_mult=mult, dtype=torch.float64))
        x, state = torch.randn(3, 9, 12), layer.init_state(3, max_position=9)
        assert_close("block", layer.step_(x, state), twin(x.double()), TOLERANCE[FLOAT32][0])


torch.manual_seed(0)
for check in (variants, slots, block):
    check()
print("agreed")
"""


def build(package: Path) -> None:
    """The extension of this checkout, its CPU half replaced by the emulated CUDA half, into a copy of the package."""
    torch_home = Path(torch.__file__).parent
    baked = {"VERSION": "0", "TORCH": torch.__version__, "CUDA_VERSION": "none", "ARCHS": "none"}
    version = (ROOT / "lmn_kernels" / "_version.py").read_text(encoding="utf-8").split('"')[1]
    flags = ["-std=c++20", "-O1", "-fPIC", "-w", *(f"-DLMN_{k}={v}" for k, v in (baked | {"VERSION": version}).items())]
    headers = [torch_home / "include", torch_home / "include/torch/csrc/api/include", sysconfig.get_paths()["include"]]
    torch_headers = [f"-I{path}" for path in headers]
    emulated = ROOT / "tests" / "emulated_cuda"
    # Fibers jump to where a checked longjmp would not.
    fibers = ["-U_FORTIFY_SOURCE", f"-I{emulated}", "-x", "c++"]
    for name, source, more in (
        *((f"{name}.o", ROOT / "csrc" / f"{name}.cpp", torch_headers) for name in ("register", "layer")),
        ("parallel.o", emulated / "parallel.cpp", torch_headers),
        ("step.o", emulated / "step.cpp", fibers),
    ):
        command = [COMPILER, *flags, *more, "-c", str(source), "-o", str(package / name)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    binary = package / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    libraries = [f"-L{torch_home / 'lib'}", "-lc10", "-ltorch_cpu", "-ltorch", "-ltorch_python"]
    command = [COMPILER, "-shared", *package.glob("*.o"), *libraries, "-o", binary]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_cuda_kernels_agree_with_the_reference(tmp_path):
    for name in ("lmn_kernels", "python_ref", "bench", "tests"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    build(tmp_path / "lmn_kernels")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("LMN_KERNELS")}
    done = subprocess.run(
        [sys.executable, "-c", CHECK, str(tmp_path)], cwd=tmp_path, capture_output=True, text=True,
        env=environment | {"PYTHONPATH": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.strip() == "agreed"
