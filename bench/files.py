"""Files that are written whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

from .errors import RunError


def write_file(path: Path, data: bytes) -> None:
    """Put ``data`` at ``path``: after a crash or an error the file is the old one or the new one.

    Raises:
        RunError: it cannot be written; an older file of that name is as it was.
    """
    # In the same folder: a rename across file systems would be a copy.
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        try:
            with open(temporary, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
            _sync_folder(path.parent)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    except OSError as error:
        reason = error.strerror or error
        kept = "; the file that was there is unchanged" if path.exists() else ""
        raise RunError(f"{path}: cannot be written: {reason}{kept}") from error


def _sync_folder(folder: Path) -> None:
    """Make a rename survive a power cut; only POSIX lets a folder be opened for that."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
