"""What came of a run over a manifest."""

from dataclasses import dataclass, field
from typing import Any

from .manifest import BadItem


@dataclass
class Tally:
    """How many items there are, and what became of them."""

    total: int
    done: list[str] = field(default_factory=list)
    """Names of the items made by this run."""
    before: list[str] = field(default_factory=list)
    """Names of those that were there already, or that another run made meanwhile."""
    failed: list[BadItem] = field(default_factory=list)

    @property
    def left(self) -> int:
        """Items that are still to be made."""
        return self.total - len(self.done) - len(self.before) - len(self.failed)

    def __add__(self, other: "Tally") -> "Tally":
        """That of both."""
        return Tally(
            self.total + other.total,
            self.done + other.done,
            self.before + other.before,
            self.failed + other.failed,
        )

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "total": self.total,
            "done": self.done,
            "done_before": self.before,
            "failed": [{"where": bad.where, "name": bad.name, "reason": bad.reason} for bad in self.failed],
            "left": self.left,
        }
