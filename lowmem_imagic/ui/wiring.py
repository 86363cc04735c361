"""The wiring of the page: events call acts, and every event draws what has changed in its tab."""

import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import gradio as gr

from ..errors import LowmemImagicError
from ..unexpected import unexpected
from . import view
from .fields import with_labels
from .guard import COOKIE
from .studio import Studio, TrainingPlan
from .visitors import Project, Visitor, Visitors

HIDDEN: Literal["hidden"] = "hidden"
"""Not shown, but on the page for scripts."""
KEEP = "keep"
"""Value of an output that stays as it is."""
QUIET: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private", "concurrency_limit": None}
"""Options of every event."""
EACH: dict[str, Any] = {"trigger_mode": "multiple"}
"""Options of an event that may come again before its answer: each counts, with the fields as they were.

By default the page's library drops it, as is right for a second click on a button that begins something.
"""
IN_TURN: dict[str, Any] = {**EACH, "concurrency_limit": 1}
"""The same for choices, of which the last one counts: they are done in the order in which they come."""


@dataclass
class Tab:
    """What one tab of a visitor shows."""

    project: str = ""
    batch: str | None = ""
    """Its name; "" is the newest one, None is none."""
    plan: TrainingPlan | None = None
    """The last one; not for the fields as they are if there is a message."""
    planned: str = ""
    """The token of its photo."""
    plan_key: tuple[Any, ...] | None = None
    """Photo, base and fields of the plan that began last; of several at a time it counts."""
    plan_message: str = ""
    message: str = ""
    edits_message: str = ""
    many_message: str = ""
    begun: bool = False
    """Whether the last batch began that was to."""
    left: dict[str, str | None] = field(default_factory=dict)
    """What each list showed when a choice last left it."""
    filled: set[str] = field(default_factory=set)
    """The fields of text that an edit's recorded texts have filled."""
    shown: dict[int, Any] = field(default_factory=dict)
    """The last value of each output."""
    lock: threading.Lock = field(default_factory=threading.Lock)

    def chooses(self, name: str, showing: str | None, chosen: str | None) -> bool:
        """Whether an event of a list is a choice: a list that is closed without one sends the value that it shows.

        That value is a choice only if another one has just left it, which the page does not show yet.
        """
        if chosen == showing and self.left.get(name) != showing:
            return False
        self.left[name] = showing
        return True


class Wiring:
    """Connects the page's events with acts, and draws its outputs, for the visitor and the tab of each request.

    Args:
        studio: the acts.
        visitors: all visitors.
    """

    def __init__(self, studio: Studio, visitors: Visitors) -> None:
        self.studio, self._visitors = studio, visitors
        self._tabs: dict[str, Tab] = {}
        self._outputs: list[gr.components.Component] = []
        self._drawers: list[Callable[[Visitor, Tab], Any]] = []

    def who(self, request: gr.Request) -> tuple[Visitor, Tab]:
        """The visitor and the tab of a request; the guard has checked both."""
        visitor = self._visitors.of(str(request.cookies[COOKIE]))
        if len(self._tabs) > 10_000:
            self._tabs.clear()
        tab = self._tabs.setdefault(str(request.session_hash), Tab())
        return visitor, tab

    def _draw(self, visitor: Visitor, tab: Tab) -> list[Any]:
        """The values of all outputs; those that are shown already stay as they are."""
        with tab.lock, visitor.lock:
            values = []
            for number, drawer in enumerate(self._drawers):
                value = drawer(visitor, tab)
                same = number in tab.shown and tab.shown[number] == value
                tab.shown[number] = value
                values.append(gr.skip() if same else gr.update(**value) if isinstance(value, dict) else value)
            return values

    def _act(self, place: str, act: Callable[..., str | None]) -> Callable[..., list[Any]]:
        """A handler of an event: does the act, shows its error in one line, and draws the tab."""

        def handler(*values: Any) -> list[Any]:
            *fields, request = values
            visitor, tab = self.who(request)
            try:
                text = act(visitor, tab, *fields) or ""
            except LowmemImagicError as error:
                text = view.line(with_labels(str(error)), bad=True)
            except Exception as error:  # a fault of the page's own code is one line, too
                failure = unexpected(error)
                text = view.line(str(failure), bad=True)
                print(failure.details, file=sys.stderr, flush=True)
            if text != KEEP:
                setattr(tab, place, text)
            return self._draw(visitor, tab)

        # The page's library finds the request by its annotation.
        def with_request(request: gr.Request, *values: Any) -> list[Any]:
            return handler(*values, request)

        return with_request

    def on(
        self, trigger: Any, place: str, act: Callable[..., str | None], inputs: Sequence[Any] = (), **how: Any
    ) -> Any:
        """Connects an event to an act."""
        return trigger(self._act(place, act), inputs=list(inputs), outputs=self._outputs, **{**QUIET, **how})

    def shows(self, component: gr.components.Component, drawer: Callable[[Visitor, Tab], Any]) -> Any:
        """Registers an output, and the function that gives its value."""
        self._outputs.append(component)
        self._drawers.append(drawer)
        return component

    def project(self, visitor: Visitor, tab: Tab) -> Project | None:
        """The photo or edit that a tab shows."""
        project = visitor.project(tab.project)
        tab.project = project.token if project else ""
        return project
