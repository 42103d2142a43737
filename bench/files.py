"""Files that are written whole or not at all."""

from __future__ import annotations

from pathlib import Path

from lmn_kernels.states.files import write_whole

from .errors import RunError


def write_file(path: Path, data: bytes) -> None:
    """`write_whole`, and an error that ends a run with one line.

    Raises:
        RunError: it cannot be written; an older file of that name is as it was.
    """
    try:
        write_whole(path, data)
    except OSError as error:
        reason = error.strerror or error
        kept = "; the file that was there is unchanged" if path.exists() else ""
        raise RunError(f"{path}: cannot be written: {reason}{kept}") from error
