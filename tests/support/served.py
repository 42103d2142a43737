"""Which backend served: what a check has compared, it says, and asserts."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

# Operations of the step take no name of a backend: the extension's kernels take the reference's place.
STEP = ("update_", "decode_", "step")


class Served(TorchDispatchMode):
    """Backends by operation of the package, of all calls while it is active, those of a backward pass included.

    A step that runs on the reference is no operation, and so not among them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, set[str]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "lmn_kernels":
            name = func._schema.name.partition("::")[2]
            names = [argument.name for argument in func._schema.arguments]
            given = dict(zip(names, args, strict=False)) | kwargs
            device = next(value for value in args if isinstance(value, torch.Tensor)).device
            self.found.setdefault(name, set()).add(given["backend"] if name not in STEP else step_backend(name, device))
        return func(*args, **kwargs)

    def check(self, backend: str, *operations: str) -> None:
        """Exactly these operations were called, and this backend served all of them.

        Raises:
            AssertionError: naming what was found.
        """
        expected = {name: {backend} for name in operations}
        assert self.found == expected, f"expected that {backend} serves {sorted(operations)}, got {self.found}"


def step_backend(name: str, device: torch.device) -> str:
    """Whose kernel the dispatcher has for an operation of the step on a device."""
    key = "CUDA" if device.type == "cuda" else "CPU"
    return "cpp" if torch._C._dispatch_has_kernel_for_dispatch_key(f"lmn_kernels::{name}", key) else "reference"
