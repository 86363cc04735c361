"""The page's tab for batches."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from ..pictures.formats import has_photo_suffix
from ..settings.options import PICTURES, TRAINING, options_of
from . import view
from .fields import LABELS, offered, values_of, with_labels
from .fields import field as field_of
from .visitors import BatchFolder, Visitor
from .wiring import HIDDEN, IN_TURN, QUIET, Tab, Wiring


class ManyTab:
    """The tab for batches.

    Args:
        wiring: connects its events and draws its outputs.
    """

    def __init__(self, wiring: Wiring) -> None:
        self._wiring = wiring

    def build(self) -> Callable[[], None]:
        """Puts the fields on the page; returns what connects their events, when all outputs of the page are known."""
        models = list(self._wiring.studio.machine.models)
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
                self._wiring.shows(gr.HTML(elem_id="many-message"), lambda visitor, tab: tab.many_message)
            with gr.Column(min_width=320):
                gr.HTML("<h2>Batches</h2>")
                which = gr.Dropdown([], label="Batch", elem_id="batch")
                self._wiring.shows(which, self._draw_batches)
                showing = gr.Textbox(visible=HIDDEN, label="the batch that is shown")
                self._wiring.shows(showing, self._draw_showing)
                self._wiring.shows(gr.HTML(elem_id="batch-status"), self._draw_batch)
                with gr.Row():
                    stop = gr.Button("Stop", variant="stop", elem_id="batch-stop")
                    again = gr.Button("Continue", elem_id="batch-continue")
                    pack = gr.Button("Pack the results", elem_id="batch-pack")
                    remove = gr.Button("Remove", elem_id="batch-remove")
                self._wiring.shows(stop, lambda visitor, tab: {"interactive": self._batch_is(visitor, tab, busy=True)})
                self._wiring.shows(pack, lambda visitor, tab: {"interactive": self._batch(visitor, tab) is not None})
                self._wiring.shows(again, lambda visitor, tab: {"interactive": self._continuable(visitor, tab)})
                self._wiring.shows(
                    remove, lambda visitor, tab: {"interactive": self._batch_is(visitor, tab, busy=False)}
                )
        options = [*first, *more]

        def begin_batch(visitor: Visitor, tab: Tab, paths: Any, sentences: str | None, model: str, *values: Any) -> str:
            tab.begun = False
            chosen = {"preset": table["preset"].default, **values_of(options, values)}
            uploads = [(path, Path(path).name) for path in paths or []]
            batch = self._wiring.studio.batches.begin(visitor, uploads, (sentences or "").splitlines(), chosen, model)
            tab.batch, tab.begun = batch.path.name, True
            return ""

        def of_batch(act: Callable[[Visitor, BatchFolder], Any]) -> Callable[..., str]:
            def run(visitor: Visitor, tab: Tab, name: str | None) -> str:
                act(visitor, visitor.required_batch(name))
                return ""

            return run

        def change(visitor: Visitor, tab: Tab, name: str | None, chosen: str | None) -> str:
            if tab.chooses("batches", name, chosen):
                tab.batch = chosen or None
            return ""

        def box_after(request: gr.Request) -> Any:
            _, tab = self._wiring.who(request)
            return None if tab.begun else gr.skip()

        def connect() -> None:
            on = self._wiring.on
            folder.upload(_photos_of, folder, uploads, **QUIET)
            begun = on(begin.click, "many_message", begin_batch, [uploads, sentences, model, *fields])
            # The photos of a batch that began are in its folder now.
            begun.then(box_after, None, uploads, **QUIET)
            on(which.input, "many_message", change, [showing, which], **IN_TURN)
            batches = self._wiring.studio.batches
            on(stop.click, "many_message", of_batch(lambda _, batch: batches.stop(batch)), [showing])
            on(again.click, "many_message", of_batch(batches.resume), [showing])
            on(pack.click, "many_message", of_batch(batches.pack), [showing])
            on(remove.click, "many_message", of_batch(batches.remove), [showing])

        return connect

    def _batch(self, visitor: Visitor, tab: Tab) -> BatchFolder | None:
        """The batch that a tab shows: the chosen one, or at first the newest; none after a removal."""
        if tab.batch == "":
            tab.batch = next(reversed(visitor.batches), "")
        elif tab.batch not in visitor.batches:
            # A second click on "Remove" removes nothing: another batch must be chosen first.
            tab.batch = None
        return visitor.batches.get(tab.batch or "")

    def _batch_is(self, visitor: Visitor, tab: Tab, *, busy: bool) -> bool:
        batch = self._batch(visitor, tab)
        return batch is not None and batch.busy == busy

    def _continuable(self, visitor: Visitor, tab: Tab) -> bool:
        batch = self._batch(visitor, tab)
        return batch is not None and not batch.busy and batch.unfinished

    def _draw_batches(self, visitor: Visitor, tab: Tab) -> dict[str, Any]:
        self._batch(visitor, tab)
        return {"choices": list(reversed(visitor.batches)), "value": tab.batch or None}

    def _draw_showing(self, visitor: Visitor, tab: Tab) -> str:
        batch = self._batch(visitor, tab)
        return "" if batch is None else batch.path.name

    def _draw_batch(self, visitor: Visitor, tab: Tab) -> str:
        batch = self._batch(visitor, tab)
        return "" if batch is None else view.batch(batch, self._wiring.studio.machine.card, with_labels)


def _photos_of(paths: Sequence[str]) -> list[str]:
    """The photos of a folder: as for `batch run`, its other files are no items."""
    return [path for path in paths if has_photo_suffix(Path(path).name)]
