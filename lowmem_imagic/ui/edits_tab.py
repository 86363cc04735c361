"""The page's tab for edit files."""

from collections.abc import Callable
from pathlib import Path

import gradio as gr

from . import view
from .visitors import Project, Refused, Visitor
from .wiring import EACH, QUIET, Tab, Wiring


class EditsTab:
    """The tab for edit files, and for the Hub.

    Args:
        wiring: connects its events and draws its outputs.
        showing: the token of the edit that is shown.
    """

    def __init__(self, wiring: Wiring, showing: gr.Textbox) -> None:
        self._wiring, self._showing = wiring, showing

    def build(self) -> Callable[[], None]:
        """Puts the fields on the page; returns what connects their events, when all outputs of the page are known."""
        models = list(self._wiring.studio.machine.models)
        with gr.Row():
            with gr.Column(min_width=320):
                gr.HTML("<h2>Save an edit file</h2>")
                self._wiring.shows(
                    gr.HTML(elem_id="edit-files"), lambda visitor, tab: view.edit_files(visitor.projects.values())
                )
                gr.HTML("<h2>Open an edit file</h2>")
                upload = gr.File(
                    label="Edit file: drop one here, or choose one",
                    file_count="single",
                    height=150,
                    elem_id="edit-file",
                )
                self._wiring.shows(
                    gr.HTML(elem_id="edit-about"),
                    lambda visitor, tab: view.about(_closed(self._wiring.project(visitor, tab))),
                )
                base = gr.Dropdown(
                    models,
                    value=None,
                    label="Base for this edit",
                    info="nothing is downloaded: choose one of the bases of this studio",
                    elem_id="edit-base",
                )
                opened = gr.Button("Open with this base", variant="primary", elem_id="edit-open")
                self._wiring.shows(
                    opened,
                    lambda visitor, tab: {"interactive": _closed(self._wiring.project(visitor, tab)) is not None},
                )
                self._wiring.shows(gr.HTML(elem_id="edits-message"), lambda visitor, tab: tab.edits_message)
            with gr.Column(min_width=320, visible=self._wiring.studio.hub):
                gr.HTML("<h2>The Hub</h2>")
                address = gr.Textbox(
                    label="An edit on the Hub",
                    info="USER/REPO, hub:USER/REPO@REVISION, or a link",
                    max_length=300,
                    elem_id="hub-address",
                )
                pull = gr.Button("Pull it", elem_id="hub-pull")
                repository = gr.Textbox(
                    label="Repository for the open edit",
                    info="USER/REPO; created if it is not there",
                    max_length=200,
                    elem_id="hub-repository",
                )
                public = gr.Checkbox(False, label="Let anyone see it", info="otherwise the repository is private")
                agreed = gr.Checkbox(
                    False,
                    label="I know that an edit gives its photo back: the repository's readers can draw the photo",
                    elem_id="hub-agreed",
                )
                push = gr.Button("Push the open edit", elem_id="hub-push")

        def open_file(visitor: Visitor, tab: Tab, path: str | None) -> str:
            if path is not None:
                tab.project = self._wiring.studio.read_edit(visitor, path, Path(path).name).token
            return ""

        def choose_base(visitor: Visitor, tab: Tab, token: str | None, model: str | None) -> str:
            project = _closed(visitor.projects.get(token or ""))
            if project is None:
                raise Refused("there is no edit file waiting for a base; drop one in first")
            if not model:
                raise Refused(f"choose a base; the file was made for {project.made_for}")
            self._wiring.studio.choose_base(visitor, project, model)
            return view.line("opened: ask it in the tab “Studio”")

        def pull_edit(visitor: Visitor, tab: Tab, address: str | None) -> str:
            tab.project = self._wiring.studio.pull(visitor, (address or "").strip()).token
            return view.line("pulled: choose its base")

        def push_edit(
            visitor: Visitor, tab: Tab, token: str | None, repository: str | None, public: bool, agreed: bool
        ) -> str:
            if not agreed:
                raise Refused("an edit gives its photo back; tick the box above the button if its readers may see it")
            project = visitor.required(token)
            said = self._wiring.studio.push(
                visitor, project, (repository or "").strip(), public=bool(public), agreed=True
            )
            return view.line(said)

        def connect() -> None:
            read = self._wiring.on(upload.upload, "edits_message", open_file, [upload], **EACH)
            read.then(lambda: None, None, upload, **QUIET)
            self._wiring.on(opened.click, "edits_message", choose_base, [self._showing, base])
            self._wiring.on(pull.click, "edits_message", pull_edit, [address])
            self._wiring.on(push.click, "edits_message", push_edit, [self._showing, repository, public, agreed])

        return connect


def _closed(project: Project | None) -> Project | None:
    """A project of an edit file that waits for its base; else None."""
    return project if project is not None and project.made_for and not project.edit else None
