"""Paths of a batch's hidden files, and the parts of a manifest."""

import re
import stat
from dataclasses import dataclass
from pathlib import Path

from ..errors import ConfigError
from ..storage.regular_files import is_plain

HIDDEN = ".lowmem-imagic"
"""Folder in a batch's folder for ledgers, which contain local paths and are not for sharing, and training states."""
_SHARD = re.compile("([1-9][0-9]{0,5})/([1-9][0-9]{0,5})")
_LEDGER = re.compile("ledger(?:-([0-9]{1,6})-of-([0-9]{1,6}))?\\.sqlite3")


@dataclass(frozen=True)
class Part:
    """One of `count` parts of a manifest: every `count`-th item. The whole manifest is part 1 of 1."""

    number: int = 1
    count: int = 1

    @staticmethod
    def of(shard: str | None) -> "Part":
        """The part for the option `shard`.

        Raises:
            ConfigError: the text is no part.
        """
        if shard is None:
            return Part()
        match = _SHARD.fullmatch(shard)
        if not match or int(match[1]) > int(match[2]):
            raise ConfigError(f"`shard` is {shard!r}, expected i/n such as 3/16 with i from 1 to n")
        return Part(int(match[1]), int(match[2]))

    def __str__(self) -> str:
        return "the whole list" if self.count == 1 else f"`shard={self.number}/{self.count}`"

    @property
    def _suffix(self) -> str:
        return "" if self.count == 1 else f"-{self.number}-of-{self.count}"

    def ledger(self, out: Path) -> Path:
        """Path of its ledger. Each part has its own, so parts need no shared disk with locks for sqlite."""
        return out / HIDDEN / f"ledger{self._suffix}.sqlite3"

    def attempts(self, out: Path) -> Path:
        """The folder of its attempts, see `attempts`."""
        return out / HIDDEN / f"training{self._suffix}"

    def shares_items(self, other: "Part") -> bool:
        """Whether the two parts may have common items."""
        return self == other or self.count != other.count


def ledgers_in(out: Path) -> dict[Part, Path]:
    """The ledgers of a batch's folder; none if its hidden folder is a link."""
    if not is_plain(out / HIDDEN, stat.S_IFDIR):
        return {}
    matches = {path: _LEDGER.fullmatch(path.name) for path in sorted((out / HIDDEN).glob("ledger*.sqlite3"))}
    return {Part(int(m[1] or 1), int(m[2] or 1)): path for path, m in matches.items() if m}
