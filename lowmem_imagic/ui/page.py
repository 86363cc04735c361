"""The page: its fields, and the act behind each button."""

import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import gradio as gr

from ..errors import LowmemImagicError
from ..pictures.formats import has_photo_suffix
from ..settings.options import PICTURES, TRAINING, Option, options_of
from ..settings.stages import BLOCKS
from ..unexpected import unexpected
from . import view
from .fields import LABELS, more_pictures, more_training, offered, values_of, with_labels
from .fields import field as field_of
from .guard import COOKIE
from .studio import Studio, TrainingPlan
from .visitors import BatchFolder, Project, Refused, Visitor, Visitors

CARDS = ("6GB", "8GB", "12GB", "16GB", "24GB")
_HIDDEN: Literal["hidden"] = "hidden"
"""Not shown, but on the page for scripts."""
_UNUSED = (3600, 3600)
"""Seconds between two clean-ups, and the age of the uploads that they delete: those that no event named."""
_KEEP = "keep"
"""Value of an output that stays as it is."""
SCRIPT = f"<script>{files(__package__).joinpath('page.js').read_text(encoding='utf-8')}</script>"
STYLE = files(__package__).joinpath("page.css").read_text(encoding="utf-8")


@dataclass
class Tab:
    """What one tab of a visitor shows."""

    project: str = ""
    batch: str = ""
    plan: TrainingPlan | None = None
    """The last one; not for the fields as they are if there is a message."""
    plan_message: str = ""
    message: str = ""
    edits_message: str = ""
    many_message: str = ""
    shown: dict[int, Any] = field(default_factory=dict)
    """The last value of each output."""
    lock: threading.Lock = field(default_factory=threading.Lock)


class Page:
    """Builds the page, and does its acts for the visitor of each request.

    Args:
        studio: the acts.
        visitors: all visitors.
    """

    def __init__(self, studio: Studio, visitors: Visitors) -> None:
        self._studio, self._visitors = studio, visitors
        self._tabs: dict[str, Tab] = {}
        self._outputs: list[gr.components.Component] = []
        self._drawers: list[Callable[[Visitor, Tab], Any]] = []

    # Requests

    def _who(self, request: gr.Request) -> tuple[Visitor, Tab]:
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
            visitor, tab = self._who(request)
            try:
                text = act(visitor, tab, *fields) or ""
            except LowmemImagicError as error:
                text = view.line(with_labels(str(error)), bad=True)
            except Exception as error:  # a fault of the page's own code is one line, too
                failure = unexpected(error)
                text = view.line(str(failure), bad=True)
                print(failure.details, file=sys.stderr, flush=True)
            if text != _KEEP:
                setattr(tab, place, text)
            return self._draw(visitor, tab)

        # The page's library finds the request by its annotation.
        def with_request(request: gr.Request, *values: Any) -> list[Any]:
            return handler(*values, request)

        return with_request

    def _on(
        self, trigger: Any, place: str, act: Callable[..., str | None], inputs: Sequence[Any] = (), **how: Any
    ) -> Any:
        """Connects an event to an act."""
        how = {"show_progress": "hidden", "concurrency_limit": None, "api_visibility": "private", **how}
        return trigger(self._act(place, act), inputs=list(inputs), outputs=self._outputs, **how)

    def _shows(self, component: gr.components.Component, drawer: Callable[[Visitor, Tab], Any]) -> Any:
        """Registers an output, and the function that gives its value."""
        self._outputs.append(component)
        self._drawers.append(drawer)
        return component

    def _project(self, visitor: Visitor, tab: Tab) -> Project | None:
        project = visitor.project(tab.project)
        tab.project = project.token if project else ""
        return project

    def _required(self, visitor: Visitor, tab: Tab) -> Project:
        project = self._project(visitor, tab)
        if project is None:
            raise Refused("there is no photo yet; choose one first, or open an edit file")
        return project

    # The page

    def build(self) -> Any:
        """The page, as `gradio.Blocks`."""
        with gr.Blocks(
            title="lowmem-imagic studio", analytics_enabled=False, fill_width=True, delete_cache=_UNUSED
        ) as page:
            gr.HTML("<h1>lowmem-imagic studio</h1>", elem_id="title")
            self._shows(
                gr.HTML(elem_id="queue"), lambda visitor, tab: view.queue_line(self._studio.card, self._studio.desk)
            )
            last = gr.Textbox(visible=_HIDDEN, label="the last photo of this tab")
            with gr.Tabs():
                with gr.Tab("Studio", id="studio"):
                    events = self._studio_tab()
                with gr.Tab("Edits", id="edits"):
                    events += self._edits_tab()
                with gr.Tab("Many", id="many"):
                    events += self._many_tab()
            # All outputs are known now.
            for connect in events:
                connect()
            self._on(gr.Timer(1.0).tick, "message", lambda visitor, tab: _KEEP)
            # With it, each open tab keeps a connection, by which the guard knows that its visitor is there.
            page.unload(lambda: None)
            remembered = "() => [sessionStorage.getItem('project') || '']"
            self._on(page.load, "message", self._open_tab, [last], js=remembered)
        return page

    def _open_tab(self, visitor: Visitor, tab: Tab, last: str) -> str:
        tab.project = last or ""
        return ""

    def _studio_tab(self) -> list[Callable[[], Any]]:
        models = list(self._studio.models)
        train_options = {option.name: option for option in options_of("train")}
        preset = train_options["preset"]
        more, asks = more_training(), more_pictures()
        with gr.Row():
            with gr.Column(scale=2, min_width=320):
                gr.HTML("<h2>1. Photo</h2>")
                upload = gr.File(
                    label="Photo: drop one here, or choose one", file_count="single", height=150, elem_id="photo-file"
                )
                switch = gr.Dropdown([], label="Your photos and edits", elem_id="projects", visible=_HIDDEN)
                self._shows(switch, self._draw_projects)
                self._shows(gr.HTML(elem_id="photo"), lambda visitor, tab: view.photo(self._project(visitor, tab)))
                gr.HTML("<h2>2. Train once</h2>")
                model = gr.Dropdown(models, value=models[0], label=LABELS["model"], elem_id="model")
                vram = gr.Dropdown(
                    list(CARDS),
                    value="8GB",
                    label=LABELS["vram"],
                    info=train_options["vram"].help,
                    allow_custom_value=True,
                    elem_id="vram",
                )
                quality = field_of(preset)
                self._shows(gr.HTML(elem_id="plan"), self._draw_plan)
                with gr.Accordion("More for training", open=False):
                    sentences = gr.Textbox(
                        label="Sentences to train for, one a line",
                        elem_id="train-sentences",
                        info=train_options["sentence"].help,
                        lines=2,
                        max_length=4000,
                    )
                    more_fields = [field_of(option) for option in more]
                with gr.Row():
                    train = gr.Button("Train", variant="primary", elem_id="train")
                    stop = gr.Button("Stop", variant="stop", elem_id="stop")
                self._shows(train, lambda visitor, tab: {"interactive": _trainable(self._project(visitor, tab))})
                self._shows(stop, lambda visitor, tab: {"interactive": _busy(self._project(visitor, tab))})
                self._shows(gr.HTML(elem_id="progress"), self._draw_progress)
                self._shows(gr.HTML(elem_id="message"), lambda visitor, tab: tab.message)
            with gr.Column(scale=3, min_width=320):
                gr.HTML("<h2>3. Ask</h2>")
                sentence = gr.Textbox(
                    label="Sentence",
                    info="the edited picture in words, unchanged parts included",
                    max_length=1000,
                    elem_id="sentence",
                )
                ask = gr.Button("Ask", variant="primary", elem_id="ask")
                self._shows(ask, lambda visitor, tab: {"interactive": _askable(self._project(visitor, tab))})
                self._shows(gr.HTML(elem_id="viewer"), lambda visitor, tab: view.pictures(self._project(visitor, tab)))
                eta = gr.Slider(
                    0,
                    1.5,
                    value=1,
                    step=0.05,
                    label="eta",
                    info="0 is the photo, 1 the sentence; let go to render finer steps",
                    elem_id="eta",
                )
                finer = gr.Button("Render this eta", size="sm", elem_id="finer")
                with gr.Accordion("More for pictures", open=False):
                    blocks = [
                        gr.Slider(
                            0, 2, value=1, step=0.05, label=f"Strength, {block} blocks", elem_id=f"strength-{block}"
                        )
                        for block in BLOCKS
                    ]
                    others = [option for option in asks if option.name != "strength"]
                    other_fields = [field_of(option) for option in others]
                history = gr.Dropdown([], label="Sentences so far", elem_id="history")
                self._shows(history, self._draw_history)
                with gr.Row():
                    sheet = gr.Button("Make a sheet", size="sm", elem_id="sheet")
                self._shows(gr.HTML(elem_id="downloads"), self._draw_downloads)

        training = [quality, vram, *more_fields]
        options: list[Option] = [preset, train_options["vram"], *more]

        def training_values(values: Sequence[Any]) -> dict[str, Any]:
            chosen = values_of(options, values)
            return {"preset": preset.default, **chosen}

        def asking_values(values: Sequence[Any]) -> dict[str, Any]:
            chosen = values_of(others, values[len(BLOCKS) :])
            strengths = [float(value) for value in values[: len(BLOCKS)]]
            if len(set(strengths)) > 1:
                chosen["strength"] = ",".join(f"{b}={s:g}" for b, s in zip(BLOCKS, strengths, strict=True))
            elif strengths[0] != 1:
                chosen["strength"] = f"{strengths[0]:g}"
            return chosen

        def open_photo(visitor: Visitor, tab: Tab, path: str | None) -> str:
            if path is None:
                return ""
            tab.project = self._studio.open_photo(visitor, path, Path(path).name).token
            return ""

        def start_training(visitor: Visitor, tab: Tab, model: str, sentences: str | None, *values: Any) -> str:
            lines = [line.strip() for line in (sentences or "").splitlines() if line.strip()]
            chosen = training_values(values)
            # Without a graphics card there is no limit to stay within.
            self._studio.train(visitor, self._required(visitor, tab), chosen, model, lines)
            return ""

        def ask_sentence(visitor: Visitor, tab: Tab, sentence: str, *values: Any) -> str:
            self._studio.ask(visitor, self._required(visitor, tab), sentence, asking_values(values))
            return ""

        def render_eta(visitor: Visitor, tab: Tab, eta: float) -> str:
            self._studio.finer(visitor, self._required(visitor, tab), round(float(eta), 2))
            return ""

        def show_again(visitor: Visitor, tab: Tab, label: str) -> str:
            project = self._required(visitor, tab)
            with visitor.lock:
                again = next((one for one in project.asks if one.label == label), None)
                if again is not None:
                    project.asks = [one for one in project.asks if one is not again] + [again]
            return ""

        def make_sheet(visitor: Visitor, tab: Tab) -> str:
            project = self._required(visitor, tab)
            if not project.asks:
                raise Refused("there are no pictures yet; ask a sentence first")
            project.asks[-1].sheet = self._studio.sheet(visitor, project, project.asks[-1])
            return ""

        def change_project(visitor: Visitor, tab: Tab, token: str) -> str:
            tab.project = token or ""
            return ""

        def stop_job(visitor: Visitor, tab: Tab) -> str:
            self._studio.stop(self._required(visitor, tab))
            return ""

        def make_plan(visitor: Visitor, tab: Tab, model: str, *values: Any) -> str:
            chosen = training_values(values)
            project, vram = self._project(visitor, tab), str(chosen.get("vram", "8GB"))
            tab.plan = self._studio.plan(visitor, project, chosen, model, vram)
            return ""

        def connect() -> None:
            on = self._on
            quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private", "concurrency_limit": None}
            opened = on(upload.upload, "message", open_photo, [upload])
            # The upload has moved to its project.
            cleared = opened.then(lambda: None, None, upload, **quiet)
            on(cleared.then, "plan_message", make_plan, [model, *training])
            for one in (model, vram, quality):
                on(one.change, "plan_message", make_plan, [model, *training])
            on(train.click, "message", start_training, [model, sentences, *training])
            on(stop.click, "message", stop_job)
            inputs = [sentence, *blocks, *other_fields]
            on(ask.click, "message", ask_sentence, inputs)
            on(sentence.submit, "message", ask_sentence, inputs)
            eta.input(None, [eta], None, js="(eta) => { window.studio.slide(eta); }")
            on(eta.release, "message", render_eta, [eta])
            on(finer.click, "message", render_eta, [eta])
            on(history.input, "message", show_again, [history])
            on(switch.input, "message", change_project, [switch])
            on(sheet.click, "message", make_sheet)

        return [connect]

    def _draw_projects(self, visitor: Visitor, tab: Tab) -> dict[str, Any]:
        choices = [(project.name, token) for token, project in reversed(visitor.projects.items())]
        project = self._project(visitor, tab)
        return {
            "choices": choices,
            "value": project.token if project else None,
            "visible": True if len(choices) > 1 else _HIDDEN,
        }

    def _draw_plan(self, visitor: Visitor, tab: Tab) -> str:
        return tab.plan_message or (view.line(self._studio.plan_words(tab.plan)) if tab.plan else "")

    def _draw_progress(self, visitor: Visitor, tab: Tab) -> str:
        project = self._project(visitor, tab)
        if project is None:
            return ""
        return view.bar(project.job, self._studio.card, with_labels(project.message), paused=project.paused)

    def _draw_history(self, visitor: Visitor, tab: Tab) -> dict[str, Any]:
        project = self._project(visitor, tab)
        labels = [ask.label for ask in project.asks] if project else []
        return {"choices": labels[::-1], "value": labels[-1] if labels else None}

    def _draw_downloads(self, visitor: Visitor, tab: Tab) -> str:
        project = self._project(visitor, tab)
        return view.downloads(project, project.asks[-1] if project and project.asks else None)

    def _edits_tab(self) -> list[Callable[[], Any]]:
        models = list(self._studio.models)
        with gr.Row():
            with gr.Column(min_width=320):
                gr.HTML("<h2>Save an edit file</h2>")
                self._shows(
                    gr.HTML(elem_id="edit-files"), lambda visitor, tab: view.edit_files(visitor.projects.values())
                )
                gr.HTML("<h2>Open an edit file</h2>")
                upload = gr.File(
                    label="Edit file: drop one here, or choose one",
                    file_count="single",
                    height=150,
                    elem_id="edit-file",
                )
                self._shows(
                    gr.HTML(elem_id="edit-about"), lambda visitor, tab: view.about(_closed(self._project(visitor, tab)))
                )
                base = gr.Dropdown(
                    models,
                    value=None,
                    label="Base for this edit",
                    info="nothing is downloaded: choose one of the bases of this studio",
                    elem_id="edit-base",
                )
                opened = gr.Button("Open with this base", variant="primary", elem_id="edit-open")
                self._shows(
                    opened, lambda visitor, tab: {"interactive": _closed(self._project(visitor, tab)) is not None}
                )
                self._shows(gr.HTML(elem_id="edits-message"), lambda visitor, tab: tab.edits_message)
            with gr.Column(min_width=320, visible=self._studio.hub):
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
                tab.project = self._studio.read_edit(visitor, path, Path(path).name).token
            return ""

        def choose_base(visitor: Visitor, tab: Tab, model: str | None) -> str:
            project = _closed(self._project(visitor, tab))
            if project is None:
                raise Refused("there is no edit file waiting for a base; drop one in first")
            if not model:
                raise Refused(f"choose a base; the file was made for {project.made_for}")
            self._studio.choose_base(visitor, project, model)
            return view.line("opened: ask it in the tab “Studio”")

        def pull_edit(visitor: Visitor, tab: Tab, address: str | None) -> str:
            tab.project = self._studio.pull(visitor, (address or "").strip()).token
            return view.line("pulled: choose its base")

        def push_edit(visitor: Visitor, tab: Tab, repository: str | None, public: bool, agreed: bool) -> str:
            if not agreed:
                raise Refused("an edit gives its photo back; tick the box above the button if its readers may see it")
            project = self._required(visitor, tab)
            said = self._studio.push(visitor, project, (repository or "").strip(), public=bool(public), agreed=True)
            return view.line(said)

        def connect() -> None:
            read = self._on(upload.upload, "edits_message", open_file, [upload])
            read.then(lambda: None, None, upload, show_progress="hidden", api_visibility="private")
            self._on(opened.click, "edits_message", choose_base, [base])
            self._on(pull.click, "edits_message", pull_edit, [address])
            self._on(push.click, "edits_message", push_edit, [repository, public, agreed])

        return [connect]

    def _many_tab(self) -> list[Callable[[], Any]]:
        models = list(self._studio.models)
        table = {option.name: option for option in options_of("batch run")}
        first = [table[name] for name in ("preset", "etas", "seeds", "vram")]
        more = offered("batch run", (TRAINING, PICTURES))
        more = [option for option in more if option not in first]
        with gr.Row():
            with gr.Column(min_width=320):
                gr.HTML("<h2>Many photos, many sentences</h2>")
                uploads = gr.File(
                    label="Photos: drop several here, or choose them",
                    file_count="multiple",
                    height=170,
                    elem_id="batch-files",
                )
                folder = gr.UploadButton("Choose a folder", file_count="directory", size="sm", elem_id="batch-folder")
                sentences = gr.Textbox(
                    label="Sentences, one a line",
                    info="every photo is edited under each",
                    lines=3,
                    max_length=8000,
                    elem_id="batch-sentences",
                )
                model = gr.Dropdown(models, value=models[0], label=LABELS["model"], elem_id="batch-model")
                with gr.Group(elem_id="batch-first"):
                    fields = [field_of(option, elem_id=f"batch-{option.name}") for option in first]
                with gr.Accordion("More for batches", open=False):
                    fields += [field_of(option, elem_id=f"batch-{option.name.replace('_', '-')}") for option in more]
                begin = gr.Button("Begin", variant="primary", elem_id="batch-begin")
                self._shows(gr.HTML(elem_id="many-message"), lambda visitor, tab: tab.many_message)
            with gr.Column(min_width=320):
                gr.HTML("<h2>Batches</h2>")
                which = gr.Dropdown([], label="Batch", elem_id="batch")
                self._shows(which, self._draw_batches)
                self._shows(gr.HTML(elem_id="batch-status"), self._draw_batch)
                with gr.Row():
                    stop = gr.Button("Stop", variant="stop", elem_id="batch-stop")
                    again = gr.Button("Continue", elem_id="batch-continue")
                    pack = gr.Button("Pack the results", elem_id="batch-pack")
                    remove = gr.Button("Remove", elem_id="batch-remove")
                self._shows(stop, lambda visitor, tab: {"interactive": self._batch_is(visitor, tab, busy=True)})
                self._shows(pack, lambda visitor, tab: {"interactive": self._batch(visitor, tab) is not None})
                for button in (again, remove):
                    self._shows(button, lambda visitor, tab: {"interactive": self._batch_is(visitor, tab, busy=False)})
        options = [*first, *more]

        def begin_batch(visitor: Visitor, tab: Tab, paths: Any, sentences: str | None, model: str, *values: Any) -> str:
            chosen = {"preset": table["preset"].default, **values_of(options, values)}
            uploads = [(path, Path(path).name) for path in paths or []]
            batch = self._studio.begin_batch(visitor, uploads, (sentences or "").splitlines(), chosen, model)
            tab.batch = batch.path.name
            return ""

        def of_batch(act: Callable[[Visitor, BatchFolder], Any]) -> Callable[..., str]:
            def run(visitor: Visitor, tab: Tab) -> str:
                batch = self._batch(visitor, tab)
                if batch is None:
                    raise Refused("there is no batch yet")
                act(visitor, batch)
                return ""

            return run

        def stop_batch(visitor: Visitor, batch: BatchFolder) -> None:
            if batch.job is not None:
                self._studio.card.stop(batch.job)

        def change(visitor: Visitor, tab: Tab, name: str | None) -> str:
            tab.batch = name or ""
            return ""

        def connect() -> None:
            on = self._on
            quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
            folder.upload(_photos_of, folder, uploads, **quiet)
            begun = on(begin.click, "many_message", begin_batch, [uploads, sentences, model, *fields])
            begun.then(lambda: None, None, uploads, **quiet)
            on(which.input, "many_message", change, [which])
            on(stop.click, "many_message", of_batch(stop_batch))
            on(again.click, "many_message", of_batch(self._studio.continue_batch))
            on(pack.click, "many_message", of_batch(self._studio.pack_batch))
            on(remove.click, "many_message", of_batch(self._studio.remove_batch))

        return [connect]

    def _batch(self, visitor: Visitor, tab: Tab) -> BatchFolder | None:
        """The batch that a tab shows: the chosen one, or the newest."""
        if tab.batch not in visitor.batches:
            tab.batch = next(reversed(visitor.batches), "")
        return visitor.batches.get(tab.batch)

    def _batch_is(self, visitor: Visitor, tab: Tab, *, busy: bool) -> bool:
        batch = self._batch(visitor, tab)
        return batch is not None and batch.busy == busy

    def _draw_batches(self, visitor: Visitor, tab: Tab) -> dict[str, Any]:
        self._batch(visitor, tab)
        return {"choices": list(reversed(visitor.batches)), "value": tab.batch or None}

    def _draw_batch(self, visitor: Visitor, tab: Tab) -> str:
        batch = self._batch(visitor, tab)
        return "" if batch is None else view.batch(batch, self._studio.card, with_labels)


def _photos_of(paths: Sequence[str]) -> list[str]:
    """The photos of a folder: as for `batch run`, its other files are no items."""
    return [path for path in paths if has_photo_suffix(Path(path).name)]


def _closed(project: Project | None) -> Project | None:
    """A project of an edit file that waits for its base; else None."""
    return project if project is not None and project.made_for and not project.edit else None


def _busy(project: Project | None) -> bool:
    return project is not None and project.busy


def _trainable(project: Project | None) -> bool:
    return project is not None and project.photo is not None and not project.busy


def _askable(project: Project | None) -> bool:
    return project is not None and bool(project.edit) and not project.busy
