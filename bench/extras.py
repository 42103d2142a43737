"""Packages of the extra ``bench``, imported when they are first used: what needs none of them runs without."""

from __future__ import annotations

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

from .errors import InputError


def need(*packages: str) -> None:
    """Whether the packages are installed; asked before hours of work that would end without one.

    Raises:
        InputError: some are not; the message names them, and what installs them.
    """
    absent = [name for name in packages if importlib.util.find_spec(name) is None]
    if absent:
        listed = " and ".join(filter(None, (", ".join(absent[:-1]), absent[-1])))
        verb = "are" if len(absent) > 1 else "is"
        raise InputError(f"{listed} {verb} not installed (pip install lmn-kernels[bench])")


class _Late:
    """A package, or what it has under a name.

    Raises:
        InputError: it is used and not installed; see `need`.
    """

    def __init__(self, package: str, name: str | None = None):
        self._package, self._name = package, name

    def _found(self) -> Any:
        need(self._package)
        package = importlib.import_module(self._package)
        return package if self._name is None else getattr(package, self._name)

    def __getattr__(self, attribute: str) -> Any:
        return getattr(self._found(), attribute)

    def __call__(self, *given: Any, **options: Any) -> Any:
        return self._found()(*given, **options)


if TYPE_CHECKING:
    import numpy as numpy
    from tabulate import tabulate as tabulate
    from tqdm import tqdm as tqdm
else:
    numpy, tabulate, tqdm = _Late("numpy"), _Late("tabulate", "tabulate"), _Late("tqdm", "tqdm")
