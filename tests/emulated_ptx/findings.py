"""What the executor reports: refusals of what it does not know, and faults of what it runs."""

from __future__ import annotations

from dataclasses import dataclass


class Refused(NotImplementedError):
    """An instruction, operand or launch that the executor does not know; it never guesses."""


class Fault(RuntimeError):
    """A launch cannot go on: a deadlock, an endless loop."""


@dataclass(frozen=True)
class Site:
    """An instruction as a finding names it: kernel, text, line of the PTX and, by the line table, of the source."""

    kernel: str
    text: str
    line: int
    source: str

    def __str__(self) -> str:
        return f"{self.kernel}, PTX line {self.line} ({self.text}), {self.source or 'no source line'}"


@dataclass
class Finding:
    """Something wrong, the same at the same instruction being one finding.

    Attributes:
        kind: "bounds", "misaligned", "uninitialised", "race", "barrier", "asynchronous", "divergence", "spin".
        what: in words.
        example: one occurrence: address, threads.
        count: of occurrences, in lanes.
    """

    kind: str
    what: str
    site: Site
    example: str
    count: int = 0

    def __str__(self) -> str:
        return f"{self.kind}: {self.what}, {self.count} times: {self.site}; {self.example}"


class Findings:
    """The findings of launches, in the order of their first occurrence."""

    def __init__(self) -> None:
        self._found: dict[tuple[str, str, Site], Finding] = {}

    def note(self, kind: str, what: str, site: Site, example: str = "", count: int = 1) -> None:
        key = (kind, what, site)
        if key not in self._found:
            self._found[key] = Finding(kind, what, site, example)
        self._found[key].count += count

    def take(self) -> list[Finding]:
        """What was found since the last call."""
        found = list(self._found.values())
        self._found.clear()
        return found
