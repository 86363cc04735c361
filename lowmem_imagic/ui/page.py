"""The page of the studio."""

from collections.abc import Callable
from importlib.resources import files
from typing import Any

import gradio as gr

from . import view
from .edits_tab import EditsTab
from .many_tab import ManyTab
from .studio import Studio
from .studio_tab import StudioTab
from .visitors import Visitor, Visitors
from .wiring import HIDDEN, KEEP, QUIET, Tab, Wiring

_UNUSED = (3600, 3600)
"""Seconds between two clean-ups, and the age of the uploads that they delete: those that no event named."""
SCRIPT = f"<script>{files(__package__).joinpath('page.js').read_text(encoding='utf-8')}</script>"
STYLE = files(__package__).joinpath("page.css").read_text(encoding="utf-8")


def page_of(studio: Studio, visitors: Visitors) -> Any:
    """The page, as `gradio.Blocks`.

    Args:
        studio: the acts.
        visitors: all visitors.
    """
    wiring = Wiring(studio, visitors)
    with gr.Blocks(
        title="lowmem-imagic studio", analytics_enabled=False, fill_width=True, delete_cache=_UNUSED
    ) as page:
        gr.HTML("<h1>lowmem-imagic studio</h1>", elem_id="title")
        machine = studio.machine
        wiring.shows(gr.HTML(elem_id="queue"), lambda visitor, tab: view.queue_line(machine.card, machine.desk))
        last = gr.Textbox(visible=HIDDEN, label="the last photo of this tab")
        # Acts are for what the page shows, and not for what the server would show by then.
        showing = gr.Textbox(visible=HIDDEN, label="the photo or edit that is shown")
        wiring.shows(showing, _draw_showing(wiring))
        with gr.Tabs():
            with gr.Tab("Studio", id="studio"):
                connections = [StudioTab(wiring, showing).build()]
            with gr.Tab("Edits", id="edits"):
                connections.append(EditsTab(wiring, showing).build())
            with gr.Tab("Many", id="many"):
                connections.append(ManyTab(wiring).build())
        # All outputs are known now.
        for connect in connections:
            connect()
        wiring.on(gr.Timer(1.0).tick, "message", lambda visitor, tab: KEEP)
        # The page's library closes its stream of answers when there are none to come. An event that is sent just before
        # it reads so gets no answer until another one opens the stream, and the page would stand still.
        gr.Timer(2.0).tick(lambda: None, trigger_mode="multiple", **QUIET)
        # With it, each open tab keeps a connection, by which the guard knows that its visitor is there.
        page.unload(lambda: None)
        remembered = "() => [sessionStorage.getItem('project') || '']"
        wiring.on(page.load, "message", _open_tab, [last], js=remembered)
    return page


def _draw_showing(wiring: Wiring) -> Callable[[Visitor, Tab], str]:
    def draw(visitor: Visitor, tab: Tab) -> str:
        project = wiring.project(visitor, tab)
        return project.token if project else ""

    return draw


def _open_tab(visitor: Visitor, tab: Tab, last: str) -> str:
    tab.project = last or ""
    return ""
