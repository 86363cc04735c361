"""Parts of the page as HTML; all text in them is escaped."""

from collections.abc import Callable, Iterable
from html import escape as _escape

from ..actions.console import STAGES
from ..amounts import counted, duration
from ..batch.overview import without_folders
from ..batch.overview_page import PAGE
from ..batch.status import status
from ..errors import ConfigError
from ..plain_text import shown
from .card import ENDED, FAILED, RUNNING, WAITING, Job, Queue
from .visitors import Ask, BatchFolder, Picture, Project

FILES, BATCHES = "/studio/file/", "/studio/batch/"
_MOST_WARNINGS = 5
_STAGES = {
    **STAGES,
    "describe": "describing the photo",
    "invert": "the photo's own noise",
    "embed": "stage 1 of 2: embedding",
    "finetune": "stage 2 of 2: adapter",
    "sample": "pictures",
}


def escape(text: str) -> str:
    """The text for markup and attributes."""
    return _escape(shown(text))


def bar(job: Job | None, queue: Queue, message: str, *, paused: bool = False) -> str:
    """The progress of a job, or its end in one line; and its warnings."""
    warnings = [] if job is None else [one for one in job.remarks if one.startswith("warning: ")]
    return _bar(job, queue, message, paused=paused) + "".join(
        line(one.replace("`", "")) for one in warnings[-_MOST_WARNINGS:]
    )


def _bar(job: Job | None, queue: Queue, message: str, *, paused: bool) -> str:
    if job is None or job.state in ENDED:
        bad = job is not None and job.state == FAILED
        if paused and not bad:
            return line("stopped; the training is saved: “Train” goes on where it was, with the same settings")
        return line(message, bad=bad) if message else ""
    if job.state == WAITING:
        before = queue.place(job)
        return line(f"waiting for the card: {counted(before, 'job')} before this one")
    assert job.state == RUNNING
    stage = _STAGES.get(job.stage, job.stage) or "loading the base"
    share, left = job.share, job.seconds_left
    words = f"{stage}: {job.step} of {job.steps}" if job.steps else stage
    words += "" if left is None else f", about {duration(left)} left"
    if job.stop_asked:
        words = f"stopping; {words}"
    return (
        f'<div class="bar" role="progressbar" aria-valuemin="0" aria-valuemax="100" aria-valuenow="{100 * share:.0f}" '
        f'aria-label="{escape(stage)}"><div style="width:{share:.1%}"></div></div>'
        f'<p class="quiet">{escape(words)}</p>'
    )


def line(text: str, *, bad: bool = False) -> str:
    """One line of text for the visitor."""
    return f'<p class="{"bad" if bad else "quiet"}" role="{"alert" if bad else "status"}">{escape(text)}</p>'


def photo(project: Project | None) -> str:
    """The photo that will be edited, at its own aspect."""
    if project is None or not project.photo_view or project.size is None:
        token = f' data-project="{escape(project.token)}"' if project else ""
        return f'<p class="quiet"{token}>No photo yet.</p>'
    notes = "; ".join(project.notes)
    remark = f'<p class="quiet">{escape(notes)}</p>' if notes else ""
    return (
        f'<figure class="photo" data-project="{escape(project.token)}">'
        f'<img src="{FILES}{project.photo_view}" alt="the photo {escape(project.name)}" '
        f'width="{project.size[0]}" height="{project.size[1]}">'
        f"<figcaption>{escape(project.name)}, {project.size[0]} x {project.size[1]} px</figcaption></figure>{remark}"
    )


def pictures(project: Project | None) -> str:
    """The before/after picture, and the row along eta."""
    ask = None if project is None or not project.asks else project.asks[-1]
    if project is None or (ask is None and project.zero is None):
        return '<p class="quiet">The pictures appear here: first the photo as the edit draws it (eta 0).</p>'
    ask = ask or Ask("", {}, pictures={(project.zero.seed, 0.0): project.zero} if project.zero else {})
    waits = ""
    if project.next_eta is not None and project.next_eta[0] is ask:
        waits = f" (eta {project.next_eta[1]:g} waits for the card)"
    if not ask.rows:
        return f'<p class="quiet">The first picture is being made{waits}.</p>'
    row = ask.rows[0]
    shown_one = max((one for one in row if one.eta <= 1), key=lambda one: one.eta, default=row[0])
    before = project.photo_view or (project.zero.view if project.zero else "")
    caption = "before: the photo" if project.photo_view else "before: eta 0"
    sentence = ask.sentence or f"the photo, as the edit draws it; trained from “{project.start_sentence}”"
    return (
        f'<div class="viewer" data-sentence="{escape(sentence)}">'
        f'<div class="compare" style="--cut: 0%">'
        f'<img class="after" src="{FILES}{shown_one.view}" alt="{escape(sentence)}, {ask.name_of(shown_one)}">'
        + (f'<img class="before" src="{FILES}{before}" alt="{caption}">' if before else "")
        + "</div>"
        + '<label class="cut">Before and after<input type="range" min="0" max="100" value="0" '
        'aria-label="Before and after: share of the picture that shows the photo"></label>'
        f'<p class="now" role="status">{escape(sentence)}: eta <output>{shown_one.eta:g}</output>{waits}</p>'
        + "".join(_row(ask, row, sentence) for row in ask.rows)
        + "</div>"
    )


def _row(ask: Ask, row: list[Picture], sentence: str) -> str:
    """The pictures of a seed along eta."""
    pictures = "".join(_small(one, ask.name_of(one), sentence) for one in row)
    return f'<div class="row" role="list">{pictures}</div>'


def _small(one: Picture, name: str, sentence: str) -> str:
    """A picture of a row: a button that shows it large."""
    seed = "" if one.seed is None else one.seed
    return (
        f'<button type="button" role="listitem" data-eta="{one.eta:g}" data-seed="{seed}" '
        f'data-src="{FILES}{one.view}" data-full="{FILES}{one.full}" aria-label="show {name}">'
        f'<img src="{FILES}{one.view}" alt="{escape(sentence)}, {name}" loading="lazy">'
        f"<span>{name}</span></button>"
    )


def downloads(project: Project | None, ask: Ask | None) -> str:
    """Links to the edit file, the sheet and the pictures at the photo's own size."""
    if project is None or not project.edit:
        return ""
    links = [(project.edit, "edit file")]
    if ask is not None:
        links += [(ask.sheet, "sheet")] if ask.sheet else []
        links += [(one.full, ask.name_of(one)) for row in ask.rows for one in row]
    elif project.zero:
        links.append((project.zero.full, "eta 0"))
    items = "".join(f'<li><a href="{FILES}{token}" download>{escape(label)}</a></li>' for token, label in links)
    return f'<nav aria-label="Downloads"><ul class="links">{items}</ul></nav>'


def queue_line(card: Queue, desk: Queue) -> str:
    """The number of jobs on the card."""
    if not (card.ready and desk.ready):
        return line("the studio is starting; photos are read in some seconds")
    count = card.length
    return line("the card is free" if not count else f"the card has {count} job{'s' if count > 1 else ''}")


def edit_files(projects: Iterable[Project]) -> str:
    """Links to all edit files of a visitor."""
    edits = [project for project in projects if project.edit]
    if not edits:
        return '<p class="quiet">No edit yet: train on a photo in the tab “Studio”.</p>'
    items = "".join(f'<li><a href="{FILES}{one.edit}" download>{escape(one.name)}</a></li>' for one in edits)
    return f'<ul class="links">{items}</ul>'


def about(project: Project | None) -> str:
    """The contents of an edit file that waits for its base."""
    if project is None:
        return ""
    lines = "\n".join(escape(one) for one in project.about.splitlines())
    made_for = f"made for {project.made_for}: choose a base below"
    return f'<pre class="facts" tabindex="0" aria-label="the edit file">{lines}</pre>{line(made_for)}'


def batch(folder: BatchFolder, queue: Queue, wording: Callable[[str], str]) -> str:
    """The progress of a batch, its failures, and links to its results."""
    name, parts = folder.path.name, []
    if folder.busy:
        parts.append(bar(folder.job, queue, ""))
    elif folder.message:
        bad = folder.job is not None and folder.job.state == FAILED
        parts.append(line(wording(folder.message), bad=bad))
    try:
        seen = status(folder.results)
    except ConfigError:
        # Before its first item is registered.
        return "".join(parts) or line("not begun yet")
    counts = ", ".join(f"{seen[state]} {state}" for state in ("done", "running", "waiting", "failed") if seen[state])
    parts.append(f"<p>{escape(name)}: {counted(seen['total'], 'item')}: {counts}</p>")
    if not folder.busy and seen["waiting"] + seen["running"]:
        parts.append(line("not finished; “Continue” goes on with it"))
    failed = [item for item in seen["items"] if item["state"] == FAILED]
    parts += [
        line(f"{item['name']}: {_without_folders(wording(item['error'] or ''), folder)}", bad=True)
        for item in failed[:20]
    ]
    if (folder.results / PAGE).is_file():
        parts.append(f'<p><a href="{BATCHES}{name}/{PAGE}" target="_blank" rel="noopener">overview page</a></p>')
    if folder.packed:
        parts.append(f'<p><a href="{FILES}{folder.packed}" download>all results in one file</a></p>')
    return "".join(parts)


def _without_folders(message: str, folder: BatchFolder) -> str:
    """The message without the folders of this machine."""
    return without_folders(without_folders(message, folder.results), folder.path)
