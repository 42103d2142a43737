"""What ends a run with one line on stderr instead of a traceback."""

from __future__ import annotations


class InputError(Exception):
    """Something the user gave cannot be used; exit status 2."""


class RunError(Exception):
    """The run itself cannot go on (a full disk, a loss that is not finite); exit status 1."""


def first_line(reason: object) -> str:
    """Of what an exception or a docstring says."""
    return str(reason).partition("\n")[0]
