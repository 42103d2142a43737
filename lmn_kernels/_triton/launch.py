"""How kernels are launched: one table, asked by kernel, width, dtype of the products, architecture and device.

The first of these that has the launch serves it, and `Launch.source` says which one did:

1. the tuned file of the device's model, ``tuned/<model>.json`` in this package;
2. the defaults of the device's architecture (`launch_defaults`);
3. the defaults of the nearest lower architecture.

A tuned file has the shape of the defaults; it may leave out what it does not improve on::

    {
      "device": "NVIDIA H200",
      "arch": 90,
      "launches": {
        "attend_bwd": {"bfloat16": {"64": {"BT": 64, "BK": 32, "num_warps": 4, "num_stages": 2}}}
      }
    }

It is read once, at the first call on such a device, and refused where anything in it is unknown or out of range. The
same question always has the same answer. What spills depends on the release of Triton as well: a release may become
one more thing that the table is asked by, in the files as a level above the launches.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch

from .launch_defaults import DEFAULTS

TUNED = Path(__file__).with_name("tuned")


@dataclass(frozen=True)
class Launch:
    """How to launch a kernel.

    Attributes:
        num_warps: warps of a program.
        num_stages: stages of its software pipeline.
        blocks: sizes by the names that the kernel or its launcher gives them (`KERNELS`).
        maxnreg: registers that a thread may use; None leaves it to the assembler, which at times spills a few bytes
            to make room for one more program.
        source: what served it; not part of what makes two launches equal.
        options: what Triton takes beside a kernel's own arguments.
    """

    num_warps: int
    num_stages: int
    blocks: Mapping[str, int] = field(hash=False)
    maxnreg: int | None = None
    source: str = field(default="the caller", compare=False)
    options: Mapping[str, int] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        if self.maxnreg is not None:
            options["maxnreg"] = self.maxnreg
        object.__setattr__(self, "blocks", MappingProxyType(dict(self.blocks)))
        object.__setattr__(self, "options", MappingProxyType(options))

    def with_blocks(self, **blocks: int) -> Launch:
        """The same launch with other sizes."""
        return replace(self, blocks={**self.blocks, **blocks})


class Kernel(NamedTuple):
    """What a kernel's launches consist of.

    Attributes:
        blocks: the values that each size may have.
        bound: the argument whose features the widest launch bounds; None where it serves all that is wider too.
    """

    blocks: Mapping[str, tuple[int, ...]]
    bound: str | None = None


_TILE = (16, 32, 64, 128, 256)
_PRODUCT = {"BM": _TILE, "BN": _TILE, "BK": _TILE}
# Levels of at most FEW rows have tiles of their own.
_TAIL = {**_PRODUCT, "FEW": tuple(range(1025)), "FEW_BM": _TILE, "FEW_BN": _TILE, "FEW_BK": _TILE}
# A program builds LEVELS levels above 2^SPAN nodes.
_BLOCK = {**_PRODUCT, "SPAN": tuple(range(1, 11)), "LEVELS": tuple(range(1, 11))}
# BT positions a tile, BK keys a step; the list of keys is padded to a multiple of 64.
_ATTEND = Kernel({"BT": _TILE, "BK": (16, 32, 64)}, "heads")
_LOOK_AHEAD = Kernel({"BT": _TILE}, "heads")

KERNELS = {
    "attend_fwd": _ATTEND,
    "attend_bwd": _ATTEND,
    "attend_bwd_reduce": Kernel({"BR": _TILE, "BC": _TILE}),
    "look_ahead_fwd": _LOOK_AHEAD,
    "look_ahead_bwd_dq": _LOOK_AHEAD,
    "look_ahead_bwd_dkv": _LOOK_AHEAD,
    "look_ahead_bwd_dtable": _LOOK_AHEAD,
    "tree_level_fwd": Kernel(_PRODUCT),
    "tree_level_bwd": Kernel(_PRODUCT),
    "tree_tail_fwd": Kernel(_TAIL),
    "tree_tail_bwd": Kernel(_TAIL),
    "tree_block_fwd": Kernel(_BLOCK, "groups"),
    "tree_block_bwd": Kernel(_BLOCK, "groups"),
    "tree_bwd_weight": Kernel(_PRODUCT),
}
_BOUNDED = {"heads": "features a head", "groups": "features a group"}
_OPTIONS = {"num_warps": (1, 2, 4, 8, 16, 32), "num_stages": tuple(range(1, 9))}
_MAXNREG = {"maxnreg": tuple(range(16, 256))}
_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}

# A launch by kernel, dtype and width.
_Launches = dict[tuple[str, torch.dtype, int], Launch]


class Table:
    """The launches of every kernel.

    Args:
        folder: where tuned files lie; one that does not exist holds none.
        defaults: as `launch_defaults.DEFAULTS`.

    Raises:
        ValueError: an entry of the defaults is unknown or out of range.
    """

    def __init__(self, folder: Path, defaults: Mapping[int, Mapping[str, Any]] = DEFAULTS):
        self._folder = folder
        self._defaults: dict[int, _Launches] = {}
        for arch in sorted(defaults, reverse=True):
            source = f"the defaults of sm_{arch}"
            self._defaults[arch] = _parse(defaults[arch], source, source)
        self._tuned: dict[tuple[str, int], _Launches] = {}
        self._found: dict[tuple[str, int, torch.dtype, int, str | None], Launch] = {}

    def widths(self, kernel: str, dtype: torch.dtype) -> list[int]:
        """The widths that have a launch, by rising width.

        Raises:
            ValueError: no such kernel, or none with products in ``dtype``.
        """
        _check_name("kernel", kernel, KERNELS)
        listed = {(kind, width) for own in self._defaults.values() for name, kind, width in own if name == kernel}
        found = sorted(width for kind, width in listed if kind == dtype)
        if not found:
            known = ", ".join(sorted({str(kind) for kind, _ in listed}))
            raise ValueError(f"dtype: expected one of {known} for {kernel}, got {dtype}")
        return found

    def look_up(self, kernel: str, width: int, dtype: torch.dtype, arch: int, model: str | None = None) -> Launch:
        """The launch that a call gets.

        Args:
            kernel: a name of `KERNELS`.
            width: features of a head, or the embedding size; the launch is that of the next width listed.
            dtype: of the operands of its products.
            arch: compute capability of the device: 75, 80, …
            model: what the device calls itself; None for no device, which has no tuned file.

        Raises:
            ValueError: no such kernel, no launch for so wide a call, this dtype or so old an architecture; or the
                device's tuned file is malformed.
        """
        asked = (kernel, width, dtype, arch, model)
        found = self._found.get(asked)
        if found is None:
            found = self._found[asked] = self._choose(*asked)
        return found

    def _choose(self, kernel: str, width: int, dtype: torch.dtype, arch: int, model: str | None) -> Launch:
        key = (kernel, dtype, self._listed(kernel, width, dtype))
        if model is not None:
            tuned = self._of_model(model, arch).get(key)
            if tuned is not None:
                return tuned
        able = [first for first, own in self._defaults.items() if key in own]
        for first in able:
            if first <= arch:
                return self._defaults[first][key]
        raise ValueError(f"arch: expected at least {min(able)} for {kernel} in {dtype}, got {arch}")

    def _listed(self, kernel: str, width: int, dtype: torch.dtype) -> int:
        widths, bound = self.widths(kernel, dtype), KERNELS[kernel].bound
        if width < 1:
            raise ValueError(f"width: expected at least 1, got {width}")
        if bound is not None and width > widths[-1]:
            raise ValueError(f"{bound}: expected at most {widths[-1]} {_BOUNDED[bound]} in {dtype}, got {width}")
        return next((listed for listed in widths if listed >= width), widths[-1])

    def _of_model(self, model: str, arch: int) -> _Launches:
        if (model, arch) not in self._tuned:
            path = self._folder / file_name(model)
            self._tuned[model, arch] = self.read(path, arch) if path.is_file() else {}
        return self._tuned[model, arch]

    def read(self, path: Path, arch: int | None = None) -> _Launches:
        """The launches of a tuned file by kernel, dtype and width.

        Args:
            path: the file, named after its device's model (`file_name`).
            arch: the compute capability that it must be for; None for any.

        Raises:
            ValueError: the file or an entry of it is malformed, unknown or out of range, or it is of another device.
        """
        try:
            content = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_once)
        except ValueError as error:
            raise ValueError(f"{path}: expected JSON, got {error}") from None
        _check_fields(str(path), content, {"device", "arch", "launches"})
        device, own, launches = content["device"], content["arch"], content["launches"]
        if not isinstance(device, str) or file_name(device) != path.name:
            raise ValueError(f"{path}: device: expected the model that the file is named after, got {device!r}")
        if type(own) is not int or arch not in (None, own):
            raise ValueError(f"{path}: arch: expected {arch or 'a compute capability such as 90'}, got {own!r}")
        found = _parse(launches, f"tuned/{path.name}", str(path))
        for kernel, dtype, width in found:
            where = f"{path}: {kernel}: {str(dtype).removeprefix('torch.')}"
            try:
                listed = self.widths(kernel, dtype)
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from None
            if width not in listed:
                raise ValueError(f"{where}: expected widths among {', '.join(map(str, listed))}, got {width}")
        return found


def file_name(model: str) -> str:
    """The name of the tuned file of a device model: ``NVIDIA_H200.json``."""
    return re.sub(r"[^A-Za-z0-9.+-]+", "_", model).strip("._") + ".json"


def _parse(entries: object, source: str, where: str) -> _Launches:
    """Kernel → dtype → width → row, as launches served by ``source``."""
    found: _Launches = {}
    for kernel, by_dtype in _items(where, entries):
        _check_name(f"{where}: kernel", kernel, KERNELS)
        for dtype, by_width in _items(f"{where}: {kernel}", by_dtype):
            _check_name(f"{where}: {kernel}: dtype", dtype, _DTYPES)
            for width, row in _items(f"{where}: {kernel}: {dtype}", by_width):
                entry = f"{where}: {kernel}: {dtype}: {width}"
                if not re.fullmatch(r"[1-9]\d*", str(width)):
                    raise ValueError(f"{entry}: expected a width, a positive integer, got {width!r}")
                found[kernel, _DTYPES[dtype], int(width)] = _launch(row, kernel, source, entry)
    return found


def _launch(row: object, kernel: str, source: str, where: str) -> Launch:
    blocks = KERNELS[kernel].blocks
    ranges: dict[str, tuple[int, ...]] = {**blocks, **_OPTIONS}
    given = dict(_items(where, row))
    if "maxnreg" in given:
        ranges |= _MAXNREG
    _check_fields(where, given, set(ranges))
    for name, value in given.items():
        allowed = ranges[name]
        if type(value) is not int or value not in allowed:
            listed = f"{allowed[0]} … {allowed[-1]}" if len(allowed) > 6 else ", ".join(map(str, allowed))
            raise ValueError(f"{where}: {name}: expected one of {listed}, got {value!r}")
    if given.get("LEVELS", 0) > given.get("SPAN", 0):
        raise ValueError(f"{where}: LEVELS: expected at most SPAN={given['SPAN']}, got {given['LEVELS']}")
    sizes = {name: given[name] for name in blocks}
    return Launch(given["num_warps"], given["num_stages"], sizes, given.get("maxnreg"), source)


def _items(where: str, value: object) -> list[tuple[Any, Any]]:
    if not isinstance(value, Mapping):
        raise ValueError(f"{where}: expected names and their values, got {value!r}")
    return list(value.items())


def _check_name(where: str, name: object, known: Mapping[str, object]) -> None:
    if name not in known:
        raise ValueError(f"{where}: expected one of {', '.join(known)}, got {name!r}")


def _check_fields(where: str, given: object, expected: set[str]) -> None:
    names = {name for name, _ in _items(where, given)}
    if names != expected:
        missing, unknown = (", ".join(sorted(part)) or "none" for part in (expected - names, names - expected))
        raise ValueError(
            f"{where}: expected the fields {', '.join(sorted(expected))}; missing: {missing}; unknown: {unknown}"
        )


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON, none of whose names comes twice."""
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{name!r} twice in one object")
        found[name] = value
    return found


LAUNCHES = Table(TUNED)


class Target(NamedTuple):
    """What the table is asked by: compute capability (75, 80, …), and what the device calls itself."""

    arch: int
    model: str | None


# The interpreter has no architecture: it gets what the first one with products in 16 bits gets.
_INTERPRETER = Target(80, None)


def target(device: torch.device) -> Target:
    return _INTERPRETER if device.index is None or device.type != "cuda" else _gpu(device.index)


@functools.cache
def _gpu(index: int) -> Target:
    major, minor = torch.cuda.get_device_capability(index)
    return Target(10 * major + minor, torch.cuda.get_device_name(index))


def launch_for(kernel: str, width: int, dtype: torch.dtype, device: torch.device) -> Launch:
    """`Table.look_up` for a device that a tensor is on: how to launch ``kernel`` there, and what served it."""
    return LAUNCHES.look_up(kernel, width, dtype, *target(device))
