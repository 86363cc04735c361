"""The studio's acts, as a page calls them: each for one visitor, and none with a path from a request."""

import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..amounts import duration
from ..errors import ConfigError, LowmemImagicError, PromptError
from ..plain_text import shown
from ..settings.text import Words
from ..storage.file_names import safe_stem
from . import limits
from .batches import Batches
from .card import DONE, FAILED, Job
from .machine import Machine, note_end, told
from .names import EDIT, PHOTO_VIEW, STATE
from .visitors import Ask, Picture, Project, Refused, Visitor

_STARTING_S = 60
"""A plan does without a time if the card's process takes longer to start."""
BUNDLED = "demo"
"""Name of the bundled base."""


@dataclass(frozen=True)
class TrainingPlan:
    """The plan of a training on a card."""

    model: str
    preset: str
    fits: bool
    fit: str
    """Whether the training fits, in words."""
    seconds: float | None
    """Estimate of its time; None if it does not fit, or the card's speed is unknown."""
    sizes: str
    """Size of the photo, and the size it is edited at, in words; "" without a photo."""


class Studio:
    """All acts on photos and edits; `batches` has those on batches.

    Args:
        models: the bases to choose from, by the names that a page shows.
        device: device of the bases.
        hub: whether edits go to the Hub and come from it, with the account of the person who started the studio.
    """

    def __init__(self, models: Mapping[str, str], device: str, *, hub: bool = True) -> None:
        self.hub = hub
        self.machine = Machine(models, device)
        self.batches = Batches(self.machine)
        self._seconds: dict[tuple[str, str], float] = {}
        """Seconds of the last training that ran without a stop, by base and preset."""
        self._speed = Job({"work": "speed", "device": device}, "measuring the speed of the card")

    def start(self) -> None:
        """Starts the processes."""
        self.machine.start()
        self.machine.card.add(self._speed)

    def close(self) -> None:
        """Ends the processes; a running training saves its state."""
        self.machine.close()

    # Photos

    def open_photo(self, visitor: Visitor, upload: str, name: str) -> Project:
        """A new project of an uploaded photo.

        Raises:
            Refused: it is no upload of this visitor.
            LowmemImagicError: it is no picture, or too large.
        """
        project = visitor.add_project(shown(name)[:80] or "photo")
        project.photo = project.folder / "photo"
        try:
            visitor.take_upload(upload, project.photo)
            result = self.machine.quickly(visitor, {"work": "photo", **self._places(project)}, "reading a photo")
        except LowmemImagicError as error:
            visitor.remove(project)
            raise Refused(str(error).replace(repr(str(project.photo)), repr(project.name))) from None
        project.size, project.notes = tuple(result["size"]), tuple(result["notes"])
        project.photo_view = visitor.serve(project.folder / PHOTO_VIEW, "image/png")
        return project

    def plan(
        self, visitor: Visitor, project: Project | None, values: Mapping[str, Any], model: str, vram: str
    ) -> TrainingPlan:
        """The plan for a photo on a card.

        Raises:
            LowmemImagicError: a setting is not valid.
        """
        size = None if project is None or project.size is None else list(project.size)
        order = {"work": "plan", "model": self.machine.base(model), "vram": vram, "values": dict(values), "size": size}
        # The first job of the card, which takes a second once its process has started.
        self._speed.ended.wait(_STARTING_S)
        order["speed"] = self._speed.result
        plan = self.machine.quickly(visitor, order, "a plan")
        fits = plan["peak_bytes"] is not None
        fit, sizes = f"does not fit: {plan['reason']}", ""
        if fits:
            fit = f"fits: {plan['peak_bytes'] / 1e9:.1f} of {vram.removesuffix('GB')} GB"
        if size and plan["edited_at"]:
            sizes = f"{size[0]} x {size[1]} px, edited at {plan['edited_at'][0]} x {plan['edited_at'][1]}"
        return TrainingPlan(model, str(values["preset"]), fits, fit, plan["seconds"] if fits else None, sizes)

    def plan_words(self, plan: TrainingPlan) -> str:
        """A plan in words, with the measured time of the last such training as soon as there is one."""
        measured, time_words = self._seconds.get((plan.model, plan.preset)), ""
        if plan.fits and measured is not None:
            time_words = f"about {duration(measured)}, as last time"
        elif plan.seconds is not None:
            time_words = f"about {duration(plan.seconds)}"
        return ", ".join(filter(None, (plan.fit, time_words, plan.sizes)))

    # Training and asking

    def train(
        self, visitor: Visitor, project: Project, values: Mapping[str, Any], model: str, sentences: Sequence[str]
    ) -> Job:
        """Begins the training of a project, or goes on with one that was stopped.

        Raises:
            Refused: the project is at work, or has no photo.
            ConfigError: a setting is not valid.
        """
        if project.photo is None:
            raise Refused("there is no photo to train on; choose one first")
        Words("train", values).edit()
        order = {
            "work": "train",
            "values": dict(values),
            "model": self.machine.base(model),
            "device": self.machine.device,
            "sentences": list(sentences),
            **self._places(project),
        }
        kind, resumed = (model, str(values["preset"])), project.paused

        def on_event(event: Mapping[str, Any]) -> None:
            if event["event"] == "trained":
                project.edit = visitor.serve(
                    project.folder / EDIT, "application/octet-stream", f"{safe_stem(project.name)}.safetensors"
                )
                project.model, project.etas, project.asks = model, tuple(event["etas"]), []
                project.start_sentence, project.zero, project.paused = event["start_sentence"], None, False
                if not resumed:
                    self._seconds[kind] = time.monotonic() - job.began_s
            elif event["event"] == "picture":
                project.zero = _picture(visitor, project, event)
            elif event["event"] == "end":
                project.paused = (project.folder / STATE).exists()

        job = self._begin(visitor, project, order, "training", on_event)
        return job

    def ask(self, visitor: Visitor, project: Project, sentence: str, values: Mapping[str, Any]) -> Ask:
        """Begins to render a sentence from every seed, at the edit's own etas.

        Raises:
            Refused: the project is at work, or has no edit.
            PromptError: there is no sentence.
            ConfigError: a setting is not valid.
        """
        if not project.edit:
            raise Refused("there is no edit to ask; train on a photo, or open an edit file")
        sentence = " ".join(sentence.split())
        if not sentence:
            raise PromptError("the sentence is empty; describe the edited picture, unchanged parts included")
        own = dict(values)
        seeds = tuple(Words("sample", own).sampling().get("seeds", (None,)))
        if len(seeds) > limits.MAX_SEEDS:
            raise ConfigError(f"`seeds` has {len(seeds)} numbers, expected at most {limits.MAX_SEEDS}")
        with visitor.lock:
            ask = next((one for one in project.asks if (one.sentence, one.values) == (sentence, own)), None)
            if ask is None:
                ask = Ask(sentence, own, seeds)
                if project.zero is not None and not own:
                    ask.pictures[project.zero.seed, 0.0] = project.zero
            self._render(visitor, project, ask, _first_the_sentence(project.etas))
            # The last one is shown.
            project.asks = [one for one in project.asks if one is not ask] + [ask]
        return ask

    def finer(self, visitor: Visitor, project: Project, ask: Ask, eta: float) -> None:
        """Begins to render a sentence at an eta that its row lacks, from every seed.

        While the project is at work the eta waits for the end of the job; a later one takes its place.

        Raises:
            Refused: the project is in training, which ends its rows; or the visitor has too many jobs.
        """
        with visitor.lock:
            project.next_eta = None
            if not project.busy:
                self._render(visitor, project, ask, [eta])
            elif project.job is not None and project.job.order["work"] == "train":
                raise Refused("this photo is in training; ask the sentence again when it has ended")
            elif ask.lacking([eta]):
                project.next_eta = (ask, eta)

    def _render(self, visitor: Visitor, project: Project, ask: Ask, etas: Sequence[float]) -> None:
        """Begins to render the pictures that an ask lacks at these etas, and that are not being rendered."""
        missing = ask.lacking(etas)
        if not missing or (project.busy and project.job is not None and _renders(project.job, ask, missing)):
            return
        order = {
            "work": "ask",
            "values": ask.values,
            "model": self.machine.base(project.model),
            "device": self.machine.device,
            "sentence": ask.sentence,
            "cells": missing,
            **self._places(project),
        }

        def on_event(event: Mapping[str, Any]) -> None:
            if event["event"] == "picture":
                picture = _picture(visitor, project, event)
                ask.pictures[picture.seed, picture.eta] = picture
            elif event["event"] == "end" and not ask.pictures:
                project.asks = [one for one in project.asks if one is not ask]

        self._begin(visitor, project, order, f"asking {shown(ask.sentence)[:60]!r}", on_event)

    def _render_next(self, visitor: Visitor, project: Project, ended: Job) -> None:
        """Begins with the eta that waited for a job; after a failure says that it is not rendered."""
        waiting, project.next_eta = project.next_eta, None
        if waiting is None or all(one is not waiting[0] for one in project.asks):
            return
        ask, eta = waiting
        if ended.state == FAILED:
            project.message += f"; eta {eta:g} was not rendered"
        elif ended.state == DONE:
            try:
                self._render(visitor, project, ask, [eta])
            except Refused as error:
                project.message = f"eta {eta:g} was not rendered: {error}"

    def stop(self, project: Project) -> None:
        """Stops the job of a project, and forgets the eta that waits for it; a training saves its state."""
        project.next_eta = None
        if project.job is not None:
            self.machine.card.stop(project.job)

    def remove(self, visitor: Visitor, project: Project) -> None:
        """Deletes a photo with all that was made of it.

        Raises:
            Refused: it is at work.
        """
        with visitor.lock:
            if project.busy:
                raise Refused("this photo is at work; stop it first")
            visitor.remove(project)

    def sheet(self, visitor: Visitor, project: Project, ask: Ask) -> str:
        """The token of a sheet of an ask's pictures.

        Raises:
            LowmemImagicError: it cannot be made.
        """
        cells = []
        if project.photo_view:
            cells.append(("photo", str(project.folder / PHOTO_VIEW)))
        for picture in (one for row in ask.rows for one in row):
            label = ask.name_of(picture) + (" (reconstruction)" if picture.eta == 0 else "")
            cells.append((label, str(project.folder / f"{picture.name}-view.png")))
        out = project.folder / f"sheet-{secrets.token_hex(6)}.png"
        order = {"work": "sheet", "cells": cells, "title": ask.sentence, "footer": project.model, "out": str(out)}
        self.machine.quickly(visitor, order, "a sheet")
        return visitor.serve(out, "image/png", f"{safe_stem(ask.sentence)}-sheet.png")

    # Edit files

    def read_edit(self, visitor: Visitor, upload: str, name: str) -> Project:
        """A new project of an uploaded edit file, whose base is still to be chosen.

        Raises:
            LowmemImagicError: it is no valid edit file.
        """
        return self._edit_project(visitor, name, {"work": "edit_file"}, upload)

    def _edit_project(
        self, visitor: Visitor, name: str, order: Mapping[str, Any], upload: str | None = None
    ) -> Project:
        project = visitor.add_project(shown(name)[:80] or "edit")
        file = project.folder / EDIT
        try:
            if upload is not None:
                visitor.take_upload(upload, file)
            result = self.machine.quickly(visitor, {**order, "file": str(file)}, "reading an edit file")
        except LowmemImagicError as error:
            visitor.remove(project)
            raise Refused(
                str(error).replace(repr(str(file)), repr(project.name)).replace(str(file), project.name)
            ) from None
        project.made_for, project.etas = result["base"], tuple(result["etas"])
        project.start_sentence, project.texts = result["start_sentence"], result["texts"]
        project.about = result["summary"].replace(str(file), project.name)
        return project

    def choose_base(self, visitor: Visitor, project: Project, model: str) -> None:
        """Opens an edit file with a base, and begins to render its photo (eta 0).

        Raises:
            Refused: the base is none of those to choose from.
        """
        self.machine.base(model)
        project.model = model
        download = f"{safe_stem(project.name.removesuffix('.safetensors'))}.safetensors"
        project.edit = visitor.serve(project.folder / EDIT, "application/octet-stream", download)

        def on_event(event: Mapping[str, Any]) -> None:
            if event["event"] == "picture":
                project.zero = _picture(visitor, project, event)

        order = {
            "work": "ask",
            "values": {},
            "model": self.machine.base(model),
            "device": self.machine.device,
            "sentence": None,
            "cells": [(None, 0.0)],
            **self._places(project),
        }
        self._begin(visitor, project, order, "opening an edit", on_event)

    # The Hub

    def push(self, visitor: Visitor, project: Project, repository: str, *, public: bool, agreed: bool) -> str:
        """Uploads an edit to the Hub; returns its address.

        Raises:
            Refused: the studio serves other machines, or the upload failed.
        """
        self._check_hub()
        if not project.edit:
            raise Refused("there is no edit to upload; train one, or open a file")
        order = {
            "work": "push",
            "file": str(project.folder / EDIT),
            "repository": repository,
            "public": public,
            "agreed": agreed,
        }
        return str(self.machine.quickly(visitor, order, "uploading an edit"))

    def pull(self, visitor: Visitor, address: str) -> Project:
        """A new project of an edit on the Hub, whose base is still to be chosen.

        Raises:
            Refused: the studio serves other machines, or there is no such edit.
        """
        self._check_hub()
        return self._edit_project(visitor, address, {"work": "pull", "address": address})

    def _check_hub(self) -> None:
        """Refuses the Hub to visitors of other machines: the person who started the studio is logged in there.

        Raises:
            Refused: the studio serves other machines.
        """
        if not self.hub:
            raise Refused("a studio that serves other machines does not use its owner's account on the Hub")

    # Common parts

    def _begin(self, visitor: Visitor, project: Project, order: Mapping[str, Any], title: str, on_event: Any) -> Job:
        with visitor.lock:
            if project.busy:
                raise Refused("this photo is at work; wait, or stop it first")
            self.machine.check_room(visitor)

            def booked(event: Mapping[str, Any]) -> None:
                with visitor.lock:
                    on_event(event)
                    if event["event"] == "end":
                        project.message = told(job)
                        note_end(visitor)
                        if project.job is job:
                            self._render_next(visitor, project, job)

            job = Job(order, title, visitor.id, booked)
            project.job, project.message = job, ""
        return self.machine.card.add(job)

    @staticmethod
    def _places(project: Project) -> dict[str, Any]:
        return {"folder": str(project.folder), "photo": None if project.photo is None else str(project.photo)}


def _picture(visitor: Visitor, project: Project, event: Mapping[str, Any]) -> Picture:
    """A picture that was just made, with its files served."""
    seed, eta, name = event["seed"], float(event["eta"]), str(event["name"])
    view = visitor.serve(project.folder / f"{name}-view.png", "image/png")
    download = f"{safe_stem(project.name)}-eta-{eta:.2f}{'' if seed is None else f'-seed-{seed}'}.png"
    full = visitor.serve(project.folder / f"{name}.png", "image/png", download)
    return Picture(seed, eta, name, view, full)


def _renders(job: Job, ask: Ask, cells: Sequence[tuple[int | None, float]]) -> bool:
    """Whether a job renders these pictures of an ask, among others."""
    order = job.order
    if job.stop_asked or order["work"] != "ask":
        return False
    return (order["sentence"], order["values"]) == (ask.sentence, ask.values) and set(cells) <= set(order["cells"])


def _first_the_sentence(etas: Sequence[float]) -> list[float]:
    """The etas in the order in which they are rendered: first those that show most."""
    return sorted(etas, key=lambda eta: abs(eta - 1))
