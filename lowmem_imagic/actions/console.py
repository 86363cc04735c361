"""Standard error of the commands: remarks, warnings, progress bars."""

import sys
from collections.abc import Callable, Sequence
from typing import Any

from tqdm import tqdm

from ..plain_text import shown

STAGES = {
    "describe": "photo's description",
    "invert": "photo's own noise",
    "embed": "1/3 embedding",
    "finetune": "2/3 adapter",
    "train": "edits",
    "sample": "3/3 pictures",
}


class Console:
    """Standard error: remarks, and progress bars with the time left (on a terminal).

    Args:
        quiet: show warnings only.
        wording: puts a program's own words in place of the names of settings in a message.
    """

    def __init__(self, *, quiet: bool = False, wording: Callable[[str], str] = str) -> None:
        self._quiet, self._wording = quiet, wording
        self._bar: tqdm[Any] | None = None
        self._stage = ""
        self.warnings: list[str] = []

    def say(self, text: str, *, always: bool = False) -> None:
        """Shows a remark; with `always`, even when quiet."""
        if always or not self._quiet:
            self._print(text)

    def warn(self, text: str) -> None:
        """Shows a warning, even when quiet, and keeps it for the report."""
        if text:
            self.warnings.append(text)
            self._print(f"warning: {text}")

    def _print(self, text: str) -> None:
        """Prints a line above the bar, if there is one."""
        text = shown(self._wording(text))
        if self._bar is None:
            print(text, file=sys.stderr)
        else:
            self._bar.write(text, file=sys.stderr)

    def progress(self, stage: str, step: int, steps: int, remark: str) -> None:
        """Shows the progress of a stage."""
        if self._quiet:
            return
        remark = shown(remark)
        if self._bar is None or stage != self._stage:
            self.close()
            self._stage = stage
            # Steps before the bar began took none of its time.
            self._bar = tqdm(
                total=steps, initial=step, desc=STAGES.get(stage, stage), unit="step", disable=None, leave=True
            )
            self._bar.set_postfix_str(remark)
        self._bar.total = steps
        self._bar.set_postfix_str(remark, refresh=False)
        self._bar.update(step - self._bar.n)
        if step >= steps:
            self.close()

    def skip(self, steps: int) -> None:
        """Marks so many more steps as done before the current bar began."""
        if self._bar is not None and not self._bar.disable:
            self._bar.n += steps
            self._bar.initial = self._bar.n
            # tqdm takes its rate from the steps since it last printed.
            self._bar.last_print_n += steps

    def close(self) -> None:
        """Ends the current bar."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


class Silent(Console):
    """Shows nothing; collects warnings for a report, after those in `warnings`."""

    def __init__(self, warnings: Sequence[str] = ()) -> None:
        super().__init__(quiet=True)
        self.warnings += warnings

    def _print(self, text: str) -> None:
        pass
