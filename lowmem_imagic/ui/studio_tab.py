"""The page's tab for one photo."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from ..errors import LowmemImagicError
from ..settings.options import Option, options_of
from ..settings.stages import BLOCKS
from . import view
from .fields import LABELS, more_pictures, more_training, values_of, with_labels
from .fields import field as field_of
from .visitors import Project, Refused, Visitor
from .wiring import EACH, HIDDEN, IN_TURN, KEEP, QUIET, Tab, Wiring

RECORDED_TEXTS = ("source", "negative")
"""Options whose recorded values the page shows, so that one can empty them."""
CARDS = ("6GB", "8GB", "12GB", "16GB", "24GB")


class StudioTab:
    """The tab for one photo: train it once, ask it many times.

    Args:
        wiring: connects its events and draws its outputs.
        showing: the token of the photo or edit that is shown.
    """

    def __init__(self, wiring: Wiring, showing: gr.Textbox) -> None:
        self._wiring, self._showing = wiring, showing

    def build(self) -> Callable[[], None]:
        """Puts the fields on the page; returns what connects their events, when all outputs of the page are known."""
        models = list(self._wiring.studio.machine.models)
        train_options = {option.name: option for option in options_of("train")}
        preset = train_options["preset"]
        more, asks = more_training(), more_pictures()
        with gr.Row():
            with gr.Column(scale=2, min_width=320):
                gr.HTML("<h2>1. Photo</h2>")
                upload = gr.File(
                    label="Photo: drop one here, or choose one", file_count="single", height=150, elem_id="photo-file"
                )
                switch = gr.Dropdown([], label="Your photos and edits", elem_id="projects", visible=HIDDEN)
                self._wiring.shows(switch, self._draw_projects)
                self._wiring.shows(
                    gr.HTML(elem_id="photo"), lambda visitor, tab: view.photo(self._wiring.project(visitor, tab))
                )
                remove = gr.Button("Remove this photo and its edit", size="sm", elem_id="remove-project")
                self._wiring.shows(
                    remove, lambda visitor, tab: {"interactive": _removable(self._wiring.project(visitor, tab))}
                )
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
                self._wiring.shows(gr.HTML(elem_id="plan"), self._draw_plan)
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
                self._wiring.shows(
                    train, lambda visitor, tab: {"interactive": _trainable(self._wiring.project(visitor, tab))}
                )
                self._wiring.shows(
                    stop, lambda visitor, tab: {"interactive": _busy(self._wiring.project(visitor, tab))}
                )
                self._wiring.shows(gr.HTML(elem_id="progress"), self._draw_progress)
                self._wiring.shows(gr.HTML(elem_id="message"), lambda visitor, tab: tab.message)
            with gr.Column(scale=3, min_width=320):
                gr.HTML("<h2>3. Ask</h2>")
                sentence = gr.Textbox(
                    label="Sentence",
                    info="the edited picture in words, unchanged parts included",
                    max_length=1000,
                    elem_id="sentence",
                )
                ask = gr.Button("Ask", variant="primary", elem_id="ask")
                self._wiring.shows(
                    ask, lambda visitor, tab: {"interactive": _askable(self._wiring.project(visitor, tab))}
                )
                self._wiring.shows(
                    gr.HTML(elem_id="viewer"), lambda visitor, tab: view.pictures(self._wiring.project(visitor, tab))
                )
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
                    for option, text_field in zip(others, other_fields, strict=True):
                        if option.name in RECORDED_TEXTS:
                            self._wiring.shows(text_field, self._draw_text(option.name))
                history = gr.Dropdown([], label="Sentences so far", elem_id="history")
                self._wiring.shows(history, self._draw_history)
                asked = gr.Textbox(visible=HIDDEN, label="the sentence that is shown")
                self._wiring.shows(asked, self._draw_asked)
                with gr.Row():
                    sheet = gr.Button("Make a sheet", size="sm", elem_id="sheet")
                self._wiring.shows(gr.HTML(elem_id="downloads"), self._draw_downloads)

        training = [quality, vram, *more_fields]
        options: list[Option] = [preset, train_options["vram"], *more]

        def training_values(values: Sequence[Any]) -> dict[str, Any]:
            chosen = values_of(options, values)
            return {"preset": preset.default, **chosen}

        def asking_values(project: Project, values: Sequence[Any]) -> dict[str, Any]:
            chosen = values_of(others, values[len(BLOCKS) :], project.texts)
            strengths = [float(value) for value in values[: len(BLOCKS)]]
            if len(set(strengths)) > 1:
                chosen["strength"] = ",".join(f"{b}={s:g}" for b, s in zip(BLOCKS, strengths, strict=True))
            elif strengths[0] != 1:
                chosen["strength"] = f"{strengths[0]:g}"
            return chosen

        def open_photo(visitor: Visitor, tab: Tab, path: str | None) -> str:
            if path is None:
                return ""
            tab.project = self._wiring.studio.open_photo(visitor, path, Path(path).name).token
            return ""

        def start_training(
            visitor: Visitor, tab: Tab, token: str | None, model: str, sentences: str | None, *values: Any
        ) -> str:
            lines = [line.strip() for line in (sentences or "").splitlines() if line.strip()]
            self._wiring.studio.train(visitor, visitor.required(token), training_values(values), model, lines)
            return ""

        def ask_sentence(visitor: Visitor, tab: Tab, token: str | None, sentence: str, *values: Any) -> str:
            project = visitor.required(token)
            self._wiring.studio.ask(visitor, project, sentence, asking_values(project, values))
            return ""

        def render_eta(visitor: Visitor, tab: Tab, token: str | None, label: str | None, eta: float) -> str:
            project = visitor.required(token)
            ask = project.ask_of(label)
            if ask is not None:
                self._wiring.studio.finer(visitor, project, ask, round(float(eta), 2))
            return ""

        def show_again(visitor: Visitor, tab: Tab, token: str | None, label: str | None, chosen: str | None) -> str:
            project = visitor.required(token)
            with visitor.lock:
                again = project.ask_of(chosen)
                if again is not None and tab.chooses("history", label, chosen):
                    project.asks = [one for one in project.asks if one is not again] + [again]
            return ""

        def make_sheet(visitor: Visitor, tab: Tab, token: str | None, label: str | None) -> str:
            project = visitor.required(token)
            ask = project.ask_of(label)
            if ask is None:
                raise Refused("there are no pictures yet; ask a sentence first")
            ask.sheet = self._wiring.studio.sheet(visitor, project, ask)
            return ""

        def change_project(visitor: Visitor, tab: Tab, token: str | None, chosen: str | None) -> str:
            if tab.chooses("projects", token, chosen):
                tab.project = chosen or ""
            return ""

        def remove_project(visitor: Visitor, tab: Tab, token: str | None) -> str:
            self._wiring.studio.remove(visitor, visitor.required(token))
            return ""

        def stop_job(visitor: Visitor, tab: Tab, token: str | None) -> str:
            self._wiring.studio.stop(visitor.required(token))
            return ""

        def make_plan(visitor: Visitor, tab: Tab, token: str | None, model: str, *values: Any) -> str:
            chosen, project = training_values(values), visitor.projects.get(token or "")
            if project is not None and project.photo is None:
                return ""
            key = (token or "", project and project.size, model, *values)
            with tab.lock:
                if key == tab.plan_key:
                    return KEEP
                tab.plan_key = key
            try:
                plan = self._wiring.studio.plan(visitor, project, chosen, model, str(chosen.get("vram", "8GB")))
            except LowmemImagicError:
                if key != tab.plan_key:
                    return KEEP
                tab.plan_key = None
                raise
            if key != tab.plan_key:
                return KEEP
            tab.plan, tab.planned = plan, token or ""
            return ""

        def connect() -> None:
            on = self._wiring.on
            showing, shown_ask = self._showing, [self._showing, asked]
            opened = on(upload.upload, "message", open_photo, [upload], **EACH)
            # The upload has moved to its project.
            cleared = opened.then(lambda: None, None, upload, **QUIET)
            # A photo is shown before its size is known.
            # Not at every key that is pressed in a field of text.
            changes = [one.blur if isinstance(one, gr.Textbox) else one.change for one in more_fields]
            for trigger in (cleared.then, *(one.change for one in (showing, model, vram, quality)), *changes):
                on(trigger, "plan_message", make_plan, [showing, model, *training], **EACH)
            on(train.click, "message", start_training, [showing, model, sentences, *training])
            on(stop.click, "message", stop_job, [showing])
            inputs = [showing, sentence, *blocks, *other_fields]
            on(ask.click, "message", ask_sentence, inputs, **EACH)
            on(sentence.submit, "message", ask_sentence, inputs, **EACH)
            eta.input(None, [eta], None, js="(eta) => { window.studio.slide(eta); }")
            on(eta.release, "message", render_eta, [*shown_ask, eta], **IN_TURN)
            on(finer.click, "message", render_eta, [*shown_ask, eta], **IN_TURN)
            on(history.input, "message", show_again, [*shown_ask, history], **IN_TURN)
            on(switch.input, "message", change_project, [showing, switch], **IN_TURN)
            on(sheet.click, "message", make_sheet, shown_ask, **EACH)
            on(remove.click, "message", remove_project, [showing])

        return connect

    def _draw_projects(self, visitor: Visitor, tab: Tab) -> dict[str, Any]:
        choices = [(project.name, token) for token, project in reversed(visitor.projects.items())]
        project = self._wiring.project(visitor, tab)
        return {
            "choices": choices,
            "value": project.token if project else None,
            "visible": True if len(choices) > 1 else HIDDEN,
        }

    def _draw_text(self, name: str) -> Callable[[Visitor, Tab], dict[str, Any]]:
        """What the field of an option begins with: the text that the edit that is shown records."""

        def draw(visitor: Visitor, tab: Tab) -> dict[str, Any]:
            project = self._wiring.project(visitor, tab)
            text = project.texts.get(name, "") if project else ""
            if text:
                tab.filled.add(name)
            # Where there never was one, the field keeps what was typed, also through a lost connection.
            return {"value": text} if name in tab.filled else {}

        return draw

    def _draw_plan(self, visitor: Visitor, tab: Tab) -> str:
        project = self._wiring.project(visitor, tab)
        if tab.plan_message or tab.plan is None or tab.planned != (project.token if project else ""):
            return tab.plan_message
        return view.line(self._wiring.studio.plan_words(tab.plan))

    def _draw_progress(self, visitor: Visitor, tab: Tab) -> str:
        project = self._wiring.project(visitor, tab)
        if project is None:
            return ""
        return view.bar(
            project.job, self._wiring.studio.machine.card, with_labels(project.message), paused=project.paused
        )

    def _draw_history(self, visitor: Visitor, tab: Tab) -> dict[str, Any]:
        project = self._wiring.project(visitor, tab)
        labels = [ask.label for ask in project.asks] if project else []
        return {"choices": labels[::-1], "value": labels[-1] if labels else None}

    def _draw_asked(self, visitor: Visitor, tab: Tab) -> str:
        project = self._wiring.project(visitor, tab)
        return project.asks[-1].label if project and project.asks else ""

    def _draw_downloads(self, visitor: Visitor, tab: Tab) -> str:
        project = self._wiring.project(visitor, tab)
        return view.downloads(project, project.asks[-1] if project and project.asks else None)


def _busy(project: Project | None) -> bool:
    return project is not None and project.busy


def _removable(project: Project | None) -> bool:
    return project is not None and not project.busy


def _trainable(project: Project | None) -> bool:
    return project is not None and project.photo is not None and not project.busy


def _askable(project: Project | None) -> bool:
    return project is not None and bool(project.edit) and not project.busy
