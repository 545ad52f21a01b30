"""What a check says: where something is wrong, with which value, and the cure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong."""

    path: str  # from the project's root
    line: int  # from 1; 0 means the file as a whole
    wrong: str
    cure: str

    @property
    def place(self) -> str:
        """`file:line`, or the file alone."""
        return f"{self.path}:{self.line}" if self.line else self.path


@dataclass(frozen=True)
class Outcome:
    """What came of one check: right when there are no findings."""

    findings: tuple[Finding, ...] = ()
    note: str = ""  # what was looked at, with its figures
    left_out: str = ""  # why the check, or a part of it, did not run

    @classmethod
    def of(cls, findings: Iterable[Finding], note: str = "") -> Outcome:
        """The outcome of a check that ran: findings in the order of their places."""
        return cls(tuple(sorted(findings, key=lambda finding: (finding.path, finding.line))), note)


class ToolMissing(Exception):
    """A program that a check calls is not on this machine."""

    def __init__(self, tool: str, cure: str) -> None:
        super().__init__(f"{tool} was not found. {cure}")
