"""Facts about the progress display of commands."""

import io
import sys

import pytest

from lowmem_imagic.actions import console
from lowmem_imagic.amounts import counted, duration
from lowmem_imagic.batch.overview_page import counts_of


class Terminal(io.StringIO):
    """A standard error that is a terminal."""

    def isatty(self) -> bool:
        return True


def watched(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """A terminal in place of standard error; not a fixture, because pytest sets its own after those."""
    monkeypatch.setattr(sys, "stderr", seen := Terminal())
    return seen


def last_bar(terminal: Terminal) -> str:
    """The bar as it was drawn last."""
    return terminal.getvalue().rpartition("\r")[2]


def test_a_bar_is_there_with_its_remark_before_the_first_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Work that begins with a wait says at once what there is to do."""
    terminal, shown = watched(monkeypatch), console.Console()
    shown.progress("train", 0, 8, "4 waiting")
    assert "edits:   0%" in terminal.getvalue() and "0/8" in terminal.getvalue() and "4 waiting" in terminal.getvalue()
    shown.close()


def test_time_left_is_of_what_the_bar_has_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps that were done before a bar began, or turn out to have been, do not make it look fast."""
    clock = [0.0]
    monkeypatch.setattr("tqdm.std.time", lambda: clock[0])
    terminal, shown = watched(monkeypatch), console.Console()
    shown.progress("train", 100, 1000, "")
    clock[0] = 4
    shown.progress("train", 104, 1000, "")
    # A step a second: 896 more take 14:56.
    assert "104/1000 [00:04<14:56,  1.00step/s]" in last_bar(terminal)
    shown.skip(200)
    shown.progress("train", 304, 1000, "")
    clock[0] = 10
    shown.progress("train", 310, 1000, "")
    assert "310/1000 [00:10<11:30,  1.00step/s]" in last_bar(terminal)
    shown.close()


def test_no_bar_where_nobody_looks(capsys: pytest.CaptureFixture[str]) -> None:
    """In a file or a pipe there are remarks and no bars."""
    shown = console.Console()
    shown.progress("train", 0, 8, "4 waiting")
    shown.skip(2)
    shown.progress("train", 8, 8, "")
    shown.say("done")
    assert capsys.readouterr().err == "done\n"


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0, "0 s"),
        (0.2, "1 s"),
        (89.4, "89 s"),
        (90, "2 min"),
        (5369, "89 min"),
        (5400, "1 h 30 min"),
        (7230, "2 h 00 min"),
    ],
)
def test_times_in_words(seconds, words):
    """Every command and page tells a time in the same words; a short time is never "0 s"."""
    assert duration(seconds) == words


def test_one_thing_has_no_plural() -> None:
    """Numbers of things have the singular for one alone; so has the line about a batch of one item."""
    assert [counted(count, "picture") for count in range(3)] == ["0 pictures", "1 picture", "2 pictures"]
    assert counts_of({"total": 1, "done": 1, "running": 0, "waiting": 0, "failed": 0}) == "1 item: 1 done"
