"""Facts about the progress display of commands."""

import io
import sys

import pytest

from lowmem_imagic.actions import console


class Terminal(io.StringIO):
    """A standard error that is a terminal."""

    def isatty(self) -> bool:
        return True


def watched(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """A terminal in place of standard error; not a fixture, because pytest sets its own after those."""
    monkeypatch.setattr(sys, "stderr", seen := Terminal())
    return seen


def rate(shown: console.Console) -> float:
    """Steps that the bar takes for its own, of which it tells the time left."""
    assert shown._bar is not None
    return float(shown._bar.n - shown._bar.initial)


def test_a_bar_is_there_with_its_remark_before_the_first_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Work that begins with a wait says at once what there is to do."""
    terminal, shown = watched(monkeypatch), console.Console()
    shown.progress("train", 0, 8, "4 waiting")
    assert "edits:   0%" in terminal.getvalue() and "0/8" in terminal.getvalue() and "4 waiting" in terminal.getvalue()
    shown.close()


def test_time_left_is_of_what_the_bar_has_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps that were done before a bar began, or turn out to have been, do not make it look fast."""
    watched(monkeypatch)
    shown = console.Console()
    shown.progress("train", 100, 1000, "")
    shown.progress("train", 104, 1000, "")
    assert rate(shown) == 4
    shown.skip(200)
    shown.progress("train", 304, 1000, "")
    assert rate(shown) == 0
    shown.progress("train", 310, 1000, "")
    assert rate(shown) == 6 and "310/1000" in shown._bar.format_meter(**shown._bar.format_dict)
    shown.close()


def test_no_bar_where_nobody_looks(capsys: pytest.CaptureFixture[str]) -> None:
    """In a file or a pipe there are remarks and no bars."""
    shown = console.Console()
    shown.progress("train", 0, 8, "4 waiting")
    shown.skip(2)
    shown.progress("train", 8, 8, "")
    shown.say("done")
    assert capsys.readouterr().err == "done\n"
