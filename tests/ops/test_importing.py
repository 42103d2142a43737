"""What an import costs, and what runs without a number to look at (R1)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch
from torch._subclasses import FakeTensorMode

from lmn_kernels import LogarithmicMemory

ROOT = Path(__file__).resolve().parents[2]


def run(code: str) -> None:
    """In a process of its own, where a warning is an error and no variable of the machine's names a backend."""
    env = {name: value for name, value in os.environ.items() if name != "LMN_KERNELS_BACKEND"}
    command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_importing_the_module_leaves_the_function():
    """``import lmn_kernels.info`` sets the attribute that ``lmn_kernels.info()`` reads."""
    run("import lmn_kernels, lmn_kernels.info; assert 'torch' in lmn_kernels.info()")


def test_importing_is_light():
    """No Triton, extension or optional package, and no CUDA context; the first call on the CPU loads the extension."""
    code = """
import sys, torch
before = set(sys.modules)
import lmn_kernels, lmn_kernels.backend.info
heavy = ("triton", "transformers", "safetensors", "hypothesis", "tqdm", "bench", "pytest")
for mine in ((), ("lmn_kernels._C",)):
    found = {name for name in set(sys.modules) - before if name.split(".")[0] in heavy or name == "lmn_kernels._C"}
    assert found <= {*mine}, found
    assert not torch.cuda.is_initialized()
    layer = lmn_kernels.LogarithmicMemory(8, 2, 2)
    layer(torch.randn(2, 9, 8)).sum().backward()
    layer.step(torch.randn(2, 1, 8), layer.init_state(2))
"""
    run(code)


def test_shapes_without_numbers():
    """On the meta device and under fake tensors nothing may look for a value: estimators of memory run this way."""
    x = torch.empty(2, 9, 8, device="meta", requires_grad=True)
    layer = LogarithmicMemory(8, 2, 2, device="meta")
    assert layer(x).shape == x.shape
    assert torch.autograd.grad(layer(x).sum(), x)[0].shape == x.shape
    with FakeTensorMode():
        fake, layer = torch.empty(2, 9, 8), LogarithmicMemory(8, 2, 2)
        assert layer(fake, lengths=torch.tensor([9, 4])).shape == fake.shape
        _, state = layer.prefill(fake)
        assert layer.step(fake[:, :1], state)[0].shape == (2, 1, 8)
