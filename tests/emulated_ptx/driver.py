"""A device of Triton's that is the executor: launches of CPU tensors compile for an architecture and run here.

Nothing of the project is patched but the names of what it asks the machine: the architecture, and how many programs
may meet at a grid barrier.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver as triton_driver

from bench.gpu.compile_kernels import SHARED_LIMIT
from lmn_kernels._triton import launch as launches
from lmn_kernels._triton import tree

from .arena import Argument, Storage
from .counts import Counts
from .findings import Findings, Refused
from .machine import FUEL, Program, launch
from .needed import multiplications
from .unset import Unset

# Programs at a grid barrier: few, but none alone.
PROGRAMS = 3


@dataclass
class Launched:
    """One launch that was executed; ``metadata`` is Triton's, with multiplications of its products (`needed`)."""

    program: Program
    text: str
    grid: int
    counts: Counts
    metadata: Any

    @property
    def lines(self) -> set[int]:
        """Lines of the PTX that some thread came to."""
        return {i.site.line for number in self.counts.blocks for i in self.program.kernel.blocks[number]}


class Device:
    """The executor as the device that Triton finds: its number is the architecture.

    Attributes:
        changed: what is done to the text of a kernel before it is read; for planted faults.
        count_memory: whether sectors and bank conflicts are counted.
        launched: what has run, where it is kept.
        fuel: blocks after which a launch has gone astray.
    """

    def __init__(self) -> None:
        self.arch = 80
        self.findings = Findings()
        self.unset = Unset()
        self.changed: Callable[[str], str] | None = None
        self.count_memory = False
        self.launched: list[Launched] | None = None
        self.programs = PROGRAMS
        self.fuel = FUEL
        self.utils = self
        self._read: dict[str, Program] = {}

    # What Triton asks a driver.

    def is_active(self) -> bool:
        return True

    def get_current_device(self) -> int:
        return self.arch

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": SHARED_LIMIT[device]}

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[Any, ...]:
        return None, binary.decode(), 0, 0, 1024

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        def run(
            x: int, y: int, z: int, stream: int, text: str, packed: Any, told: Any, enter: Any, leave: Any, *values: Any
        ) -> None:
            if (y, z) != (1, 1):
                raise Refused(f"{metadata.name}: grid: expected one dimension, got {(x, y, z)}")
            names = list(source.signature)
            constants = {
                name: value for name, value in zip(names, values, strict=True) if source.signature[name] == "constexpr"
            }
            given = [value for name, value in zip(names, values, strict=True) if name not in constants]
            self._launch(text, given, x, metadata)

        return run

    def _launch(self, text: str, given: Sequence[Any], grid: int, metadata: Any) -> None:
        if self.changed is not None:
            text = self.changed(text)
            program = Program(text)
        else:
            program = self._read.get(text) or self._read.setdefault(text, Program(text))
        storages: dict[int, Storage] = {}
        arguments = [self._argument(value, storages) for value in given]
        # What Triton keeps for scratch memory, of which our kernels have none.
        arguments += [0] * (len(program.kernel.parameters) - len(arguments))
        counts = launch(
            program, arguments, grid, None, metadata.shared, self.findings, Counts(self.count_memory), self.fuel
        )
        if self.launched is not None:
            self.launched.append(Launched(program, text, grid, counts, metadata))

    def _argument(self, value: Any, storages: dict[int, Storage]) -> Argument | int | float:
        if not isinstance(value, torch.Tensor):
            return int(value) if isinstance(value, bool | int) else float(value)
        key = value.untyped_storage().data_ptr()
        if key not in storages:
            storages[key] = self.unset.storage(value)
        size = value.element_size()
        last = sum((length - 1) * stride for length, stride in zip(value.shape, value.stride(), strict=True))
        low = value.storage_offset() * size
        return Argument(storages[key], low, low + (last + 1) * size if value.numel() else low)


def _as_text(*given: Any) -> Any:
    """Triton's hook for its stages: what it loads as a binary is the text of the PTX; products are counted before."""
    if not given:
        key = "PTX as a binary, products counted"
        return key, hashlib.sha256(key.encode()).hexdigest()
    stages = given[1]
    make = stages["ttgir"]

    def counted(source: Any, metadata: dict[str, Any]) -> Any:
        module = make(source, metadata)
        metadata["products_needed"], metadata["products_done"] = multiplications(str(module))
        return module

    stages["ttgir"] = counted
    stages["cubin"] = lambda source, metadata: source.encode()


DEVICE = Device()


def install() -> None:
    """Makes the executor Triton's device, for the rest of the process."""
    triton_driver.set_active(DEVICE)
    triton.knobs.runtime.add_stages_inspection_hook = _as_text


@contextmanager
def running(arch: int) -> Iterator[Device]:
    """Kernels compile for an architecture; what they leave of findings is an error.

    Raises:
        AssertionError: with all findings.
    """
    DEVICE.arch = arch
    DEVICE.findings.take()
    with (
        mock.patch.object(launches, "_INTERPRETER", launches.Target(arch, None)),
        mock.patch.object(tree, "_programs", lambda device: DEVICE.programs),
        DEVICE.unset.watching(),
    ):
        yield DEVICE
    found = DEVICE.findings.take()
    assert not found, "\n".join(map(str, found))
