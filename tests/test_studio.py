"""Facts about the studio's server that need no browser: who may fetch what, limits of uploads, the queue of jobs."""

import asyncio
import base64
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from queue import SimpleQueue
from typing import Any, cast

import pytest
from PIL import Image

from lowmem_imagic.errors import ConfigError, PromptError
from lowmem_imagic.settings.options import Kind, options_of
from lowmem_imagic.ui import limits
from lowmem_imagic.ui.card import DONE, FAILED, RUNNING, STOPPED, Job, Queue
from lowmem_imagic.ui.studio import Studio, TrainingPlan
from lowmem_imagic.ui.visitors import Project, Refused, Visitor, Visitors

gradio = pytest.importorskip("gradio")
from lowmem_imagic.ui import fields, view  # noqa: E402
from lowmem_imagic.ui.guard import COOKIE, Guard  # noqa: E402

HOST = "127.0.0.1:7860"


@pytest.fixture
def visitors(tmp_path: Path) -> Visitors:
    """Visitors with folders of their own."""
    (tmp_path / "visitors").mkdir()
    return Visitors(tmp_path / "visitors", tmp_path / "out")


class Site:
    """A guarded application that answers with the paths that reached it; uploads get a path each."""

    def __init__(self, visitors: Visitors, tmp_path: Path, password: str | None = None) -> None:
        self.reached: list[str] = []
        self.folder = tmp_path / "uploads"
        self.folder.mkdir()
        self.bodies: list[bytes] = []
        hosts = None if password else frozenset({HOST})
        self.guard = Guard(self._app, visitors, hosts, password)

    async def _app(self, scope: Any, receive: Any, send: Any) -> None:
        self.reached.append(scope["path"])
        self.bodies.append((await receive())["body"] if scope["method"] == "POST" else b"")
        (self.folder / "digest").mkdir(exist_ok=True)
        (self.folder / "digest" / "cat.png").write_bytes(b"x")
        body = json.dumps([str(self.folder / "digest" / "cat.png")]).encode()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": body})

    def ask(
        self,
        path: str,
        *,
        method: str = "GET",
        cookie: str | None = "a" * 32,
        body: bytes = b"",
        query: str = "",
        **headers: str,
    ) -> tuple[int, dict[str, str], bytes]:
        """The answer to a request: status, headers and body."""
        sent = {"host": HOST, **{name.replace("_", "-"): value for name, value in headers.items()}} | (
            {"cookie": f"{COOKIE}={cookie}"} if cookie else {}
        )
        if method == "POST":
            sent = {"content-length": str(len(body)), **sent}
        scope = {
            "type": "http",
            "method": method,
            "path": path,
            "query_string": query.encode(),
            "client": ("127.0.0.1", 1),
            "headers": [(name.encode(), value.encode()) for name, value in sent.items()],
        }
        answers: list[Mapping[str, Any]] = []

        async def receive() -> Mapping[str, Any]:
            return {"type": "http.request", "body": body, "more_body": False}

        async def send(message: Mapping[str, Any]) -> None:
            answers.append(message)

        asyncio.run(self.guard(scope, receive, send))
        told = {name.decode(): value.decode() for name, value in answers[0]["headers"]}
        return answers[0]["status"], told, b"".join(one.get("body", b"") for one in answers[1:])


def event(**changes: Any) -> bytes:
    """An event of a page."""
    return json.dumps({"session_hash": "tab", "fn_index": 1, "data": [], **changes}).encode()


def test_only_routes_of_the_page_pass(visitors, tmp_path):
    """Routes of the page's library that open files, addresses or code by name are not there."""
    site = Site(visitors, tmp_path)
    for path in (
        "/gradio_api/file=/etc/passwd",
        "/gradio_api/file/../../etc/passwd",
        "/gradio_api/proxy=http://example.org/",
        "/gradio_api/stream/1/2/3/playlist.m3u8",
        "/gradio_api/run/predict",
        "/gradio_api/call/predict",
        "/gradio_api/openapi.json",
        "/gradio_api/vibe-code",
        "/monitoring",
        "/login",
        "/docs",
        "/custom_component/x/y/z/../../etc/passwd",
    ):
        for method in ("GET", "POST", "PUT", "DELETE"):
            assert site.ask(path, method=method)[0] == 404, (method, path)
    assert not site.reached
    assert site.ask("/")[0] == site.ask("/gradio_api/upload", method="POST")[0] == 200


def test_a_page_elsewhere_cannot_use_the_studio(visitors, tmp_path):
    """Another host's name for this machine, and requests that another site's page makes, are refused."""
    site = Site(visitors, tmp_path)
    assert site.ask("/", host="evil.example:7860")[0] == 403
    assert site.ask("/gradio_api/queue/join", method="POST", body=event(), origin="http://evil.example")[0] == 403
    assert not site.reached
    assert site.ask("/gradio_api/queue/join", method="POST", body=event(), origin=f"http://{HOST}")[0] == 200
    _, headers, _ = site.ask("/", cookie=None)
    assert "SameSite=Strict" in headers["set-cookie"] and "HttpOnly" in headers["set-cookie"]
    assert "default-src 'self'" in headers["content-security-policy"]
    assert "frame-ancestors 'none'" in headers["content-security-policy"]


def test_a_request_names_only_own_uploads(visitors, tmp_path):
    """A path in a request passes only if this visitor uploaded it; another visitor's is refused like any other."""
    site = Site(visitors, tmp_path)
    _, _, body = site.ask("/gradio_api/upload", method="POST", body=b"x")
    [own] = json.loads(body)
    join = "/gradio_api/queue/join"
    mine = event(data=[{"path": own, "url": "http://127.0.0.1/file=/etc/passwd"}])
    assert site.ask(join, method="POST", body=mine)[0] == 200
    assert b"passwd" not in site.bodies[-1]
    _, _, body = site.ask("/gradio_api/upload", method="POST", cookie="b" * 32, body=b"x")
    assert json.loads(body) != [own]  # although its contents are the same
    for path in ("/etc/passwd", f"{own}/../1", "http://example.org/x.png", "", 7, None, [own]):
        nested = event(data=[[{"value": {"path": path}}]])
        assert site.ask(join, method="POST", body=nested)[0] == 403, path
    assert (
        site.ask(join, method="POST", cookie="b" * 32, body=event(session_hash="other", data=[{"path": own}]))[0] == 403
    )


def test_a_tab_belongs_to_its_visitor(visitors, tmp_path):
    """The events of a tab go to the visitor who opened it, even if another knows the tab's name."""
    site = Site(visitors, tmp_path)
    assert site.ask("/gradio_api/queue/join", method="POST", body=event())[0] == 200
    assert site.ask("/gradio_api/queue/data", query="session_hash=tab")[0] == 200
    assert site.ask("/gradio_api/queue/data", cookie="b" * 32, query="session_hash=tab")[0] == 403
    assert site.ask("/gradio_api/queue/join", cookie="b" * 32, method="POST", body=event())[0] == 403
    assert site.ask("/gradio_api/queue/data", cookie=None, query="session_hash=tab")[0] == 403


@pytest.mark.parametrize(
    "body",
    [b"", b"[]", b"{", b"null", b"\xff", event(session_hash=3), event(data={}), event(fn_index="1"), b"[" * 5000],
)
def test_malformed_requests_are_refused(visitors, tmp_path, body):
    """A request that is no event of the page ends in one line, and does not reach the page's library."""
    site = Site(visitors, tmp_path)
    status, _, text = site.ask("/gradio_api/queue/join", method="POST", body=body)
    assert status == 400 and text.decode().count("\n") == 0 and not site.reached


def test_uploads_are_limited_before_they_are_read(visitors, tmp_path, monkeypatch):
    """An upload without a length, or beyond the room of its visitor or of all, is refused by its header alone."""
    site = Site(visitors, tmp_path)
    upload = "/gradio_api/upload"
    assert site.ask(upload, method="POST", content_length="x")[0] == 411
    assert site.ask(upload, method="POST", content_length=str(limits.MAX_UPLOADS_BYTES + 1))[0] == 413
    assert site.ask(upload, method="POST", content_length="-1")[0] == 411
    assert not site.reached
    monkeypatch.setattr(limits, "MAX_VISITORS_BYTES", 10)
    assert site.ask(upload, method="POST", body=b"12345678")[0] == 200
    assert site.ask(upload, method="POST", cookie="b" * 32, body=b"12345678")[0] == 413
    long = event(data=["x" * limits.MAX_BODY_BYTES])
    assert site.ask("/gradio_api/queue/join", method="POST", body=long)[0] == 413


def test_other_machines_need_the_password(visitors, tmp_path):
    """With a password nothing is served without it, any host name is, and many wrong ones are answered no more."""
    site = Site(visitors, tmp_path, "correct horse")

    def login(word: str) -> int:
        code = base64.b64encode(f"me:{word}".encode()).decode()
        return site.ask("/", host="studio.example", authorization=f"Basic {code}")[0]

    assert site.ask("/")[0] == site.ask("/assets/x.js")[0] == site.ask("/studio/file/x")[0] == 401
    assert site.ask("/", authorization="Basic ???")[0] == site.ask("/", authorization="Bearer x")[0] == 401
    assert login("wrong") == 401 and not site.reached
    assert login("correct horse") == 200
    for _ in range(20):
        last = login("wrong")
    assert last == 429


def test_listening_without_a_password_is_refused(monkeypatch):
    """`--listen` without a password, or with a short one, is one line."""
    from lowmem_imagic.ui.server import PASSWORD, serve

    for word in (None, "", "short"):
        monkeypatch.delenv(PASSWORD, raising=False)
        if word is not None:
            monkeypatch.setenv(PASSWORD, word)
        with pytest.raises(ConfigError, match="`listen` serves other machines and needs a password"):
            serve((), device="cpu", out=Path("studio"), port=0, listen=True, announce=print)


def test_without_the_library_one_line_says_what_to_install():
    """Without gradio the command names the extra to install."""
    script = (
        "import sys\nsys.modules['gradio'] = None\n"
        "import importlib.util as u\nfind = u.find_spec\n"
        "u.find_spec = lambda name, *more: None if name == 'gradio' else find(name, *more)\n"
        "sys.argv = ['lowmem-imagic', 'ui']\nfrom lowmem_imagic.__main__ import main\nmain()\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert "pip install '.[ui]'" in done.stderr


# Visitors


def upload(visitor: Visitor, folder: Path, data: bytes = b"x") -> str:
    """The path of an upload of a visitor."""
    (folder / str(len(list(folder.iterdir())))).mkdir()
    path = folder / str(len(list(folder.iterdir())) - 1) / "cat.png"
    path.write_bytes(data)
    visitor.uploads[str(path)] = len(data)
    return str(path)


def test_uploads_are_deleted_when_their_visitor_has_left(tmp_path):
    """Without an open tab a visitor's photos go after a while; a visitor at work keeps them, and unseen results too."""
    now = 1000.0
    (tmp_path / "visitors").mkdir()
    (tmp_path / "uploads").mkdir()
    visitors = Visitors(tmp_path / "visitors", tmp_path / "out", clock=lambda: now)
    visitor = visitors.of("a" * 32)
    project = visitor.add_project("cat.png")
    visitor.take_upload(upload(visitor, tmp_path / "uploads"), project.folder / "photo")
    unused = upload(visitor, tmp_path / "uploads")
    token = visitor.serve(project.folder / "photo", "image/png")
    project.job = Job({"work": "train"}, "training")

    now += limits.KEEP_S
    assert not visitors.sweep()
    project.job.state = DONE
    visitor.ended_s = now
    now += limits.LEAVE_S + 1
    assert not visitors.sweep()  # the visitor has not seen the end yet
    visitors.of("a" * 32)
    now += limits.LEAVE_S + 1
    assert visitors.sweep() == [visitor]
    assert not project.folder.exists() and not Path(unused).exists() and token not in visitor.files
    assert visitors.of("a" * 32) is not visitor


def test_a_visitor_with_an_open_tab_has_not_left(visitors, monkeypatch):
    """A tab that is open keeps its visitor's files, also while it asks for nothing."""
    monkeypatch.setattr(limits, "LEAVE_S", -1)
    visitor = visitors.of("a" * 32)
    visitor.tabs = 1
    assert not visitors.sweep()
    visitor.tabs = 0
    assert visitors.sweep() == [visitor]


def test_visitors_are_apart(visitors, tmp_path):
    """No visitor's table has another's files, projects or uploads."""
    (tmp_path / "uploads").mkdir()
    first, second = visitors.of("a" * 32), visitors.of("b" * 32)
    path = upload(first, tmp_path / "uploads")
    project = second.add_project("mine")
    with pytest.raises(Refused, match="no upload of this page"):
        second.take_upload(path, project.folder / "photo")
    assert second.project(first.add_project("cat").token) is project
    token = first.serve(Path(path), "image/png")
    assert token in first.files and token not in second.files
    assert first.folder != second.folder and first.batches_folder != second.batches_folder


def test_old_photos_make_room(visitors, monkeypatch):
    """The oldest photo of a visitor goes first, never one that is at work."""
    monkeypatch.setattr(limits, "MAX_PROJECTS", 2)
    visitor = visitors.of("a" * 32)
    oldest, second = visitor.add_project("1"), visitor.add_project("2")
    oldest.job = Job({"work": "train"}, "training")
    third = visitor.add_project("3")
    assert list(visitor.projects.values()) == [oldest, third] and not second.folder.exists()
    third.job = Job({"work": "train"}, "training")
    with pytest.raises(Refused, match="at work"):
        visitor.add_project("4")


# The queue


class Played:
    """In place of a process: each job's end is a function of its order."""

    ready = True

    def __init__(self, play: Callable[[Job], None]) -> None:
        self._play = play

    def start(self) -> None:
        """There is none."""

    def end(self) -> None:
        """There is none."""

    def do(self, job: Job) -> None:
        """Plays a job."""
        self._play(job)


def queue_of(play: Callable[[Job], None]) -> Queue:
    """A queue whose jobs are played."""
    queue = Queue()
    queue._process = Played(play)  # type: ignore[assignment]
    queue.start()
    return queue


def test_one_job_at_a_time_in_their_order():
    """Jobs of all visitors run one after another; each knows its place."""
    running, order, most = 0, [], 0

    def play(job: Job) -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        order.append(job.title)
        job.take({"event": "done", "result": None})
        running -= 1

    queue = queue_of(play)
    jobs = [queue.add(Job({}, str(number))) for number in range(20)]
    for job in jobs:
        assert job.ended.wait(20)
    assert order == [str(number) for number in range(20)] and most == 1


def test_a_fault_ends_its_job_alone():
    """An error of any kind is the end of one job, in one line; the next one runs."""

    def play(job: Job) -> None:
        if job.title == "bad":
            raise RuntimeError("a line\nanother")
        job.take({"event": "done", "result": 1})

    queue = queue_of(play)
    bad, good = queue.do(Job({}, "bad")), queue.do(Job({}, "good"))
    assert bad.state == FAILED and "\n" not in bad.error
    assert good.state == DONE and good.result == 1


def test_a_waiting_job_can_be_stopped():
    """A job that waits is stopped at once, and never begins."""

    release, begun = threading.Event(), []

    def play(job: Job) -> None:
        begun.append(job.title)
        release.wait(20)
        job.take({"event": "done", "result": None})

    queue = queue_of(play)
    first, second = queue.add(Job({}, "first", "a")), queue.add(Job({}, "second", "b"))
    while queue.place(second) != 1 or not begun:
        time.sleep(0.01)
    assert queue.waiting("a") == queue.waiting("b") == 1 and queue.length == 2
    queue.stop(second)
    assert second.state == STOPPED and second.ended.is_set()
    release.set()
    assert first.ended.wait(20) and begun == ["first"]


@pytest.mark.process
def test_a_crash_of_the_process_is_one_line(tmp_path):
    """A process that is killed in mid-job, or fails at a job, ends that job alone; the next one gets a new process."""
    Image.new("RGB", (40, 30), "red").save(tmp_path / "photo", "PNG")
    photo = {"work": "photo", "photo": str(tmp_path / "photo"), "folder": str(tmp_path)}
    queue = Queue()
    queue.start()
    try:
        assert queue.do(Job(photo, "first")).result["size"] == [40, 30]
        values = {"preset": "balanced"}
        order = {"work": "plan", "model": "sd15", "speed": None, "vram": "8GB", "values": values, "size": None}
        killed = queue.add(Job(order, "killed"))
        while killed.state != RUNNING:
            time.sleep(0.01)
        running = queue._process._process
        assert running is not None
        running.kill()
        assert killed.ended.wait(60)
        assert killed.state == FAILED and "signal 9, perhaps for lack of memory" in killed.error
        bad = queue.do(Job({"work": "nothing"}, "bad"))
        assert bad.state == FAILED and "\n" not in bad.error and "Traceback" in bad.details
        assert queue.do(Job(photo, "last")).state == DONE
    finally:
        queue.close()


# The page


def test_every_field_comes_from_the_table_of_options():
    """Options of training and of pictures are fields of the page, but for those that name files or are the server's."""
    shown = {option.name for option in (*fields.more_training(), *fields.more_pictures())}
    expected = {
        option.name
        for command in ("train", "sample")
        for option in options_of(command)
        if option.fills and option.kind is not Kind.PATH and not option.positional
    }
    elsewhere = {"model", "device", "etas", "batch_rows", "model_config", "vae", "text_from", "revision"}
    assert expected - shown == elsewhere
    assert not shown & elsewhere


def test_fields_left_alone_change_nothing():
    """Empty fields and defaults leave the settings to the preset; text in a field for numbers is one problem."""
    options = fields.more_training()
    assert fields.values_of(options, [option.default for option in options]) == {}
    assert fields.values_of(options, ["" if option.kind is not Kind.SWITCH else False for option in options]) == {}
    rank = [option for option in options if option.name == "rank"]
    assert fields.values_of(rank, [" 4 "]) == {"rank": 4}
    with pytest.raises(ConfigError, match="`rank` is 'four', expected a whole number"):
        fields.values_of(rank, ["four"])


def test_a_recorded_text_left_alone_changes_nothing_and_emptied_is_an_empty_text():
    """The field of a text that an edit records begins with it: left so it is left out, emptied or changed it counts."""
    texts = [option for option in fields.more_pictures() if option.name in ("source", "negative")]
    recorded = {"source": "a red cube"}
    source = [option for option in texts if option.name == "source"]
    assert fields.values_of(source, ["a red  cube "], recorded) == {}
    assert fields.values_of(source, [""], recorded) == {"source": ""}
    assert fields.values_of(source, ["a cone"], recorded) == {"source": "a cone"}
    assert fields.values_of(source, [""], {}) == {}
    assert fields.values_of(texts, ["", ""], recorded) == {"source": ""}


def test_messages_name_fields():
    """A message about a setting names the field of the page."""
    assert fields.with_labels("`rank` is 0; see `finetune.lora_rank=4`") == "“LoRA rank” is 0; see “LoRA rank” 4"


def test_text_of_visitors_is_escaped(visitors):
    """A sentence, a photo's name or an error is text on the page, never markup."""
    studio = Studio({"demo": "demo"}, "cpu")
    visitor = visitors.of("a" * 32)
    evil = '<img src=x onerror="alert(1)">\u202e'
    project = visitor.add_project(evil)
    project.photo_view, project.size, project.edit = "token", (8, 8), "token"
    from lowmem_imagic.ui.visitors import Ask, Picture

    project.asks.append(Ask(evil, {}, pictures={(None, 1.0): Picture(None, 1.0, "name", "view", "full")}))
    job = Job({}, "x")
    job.state, job.error = FAILED, evil
    parts = [
        view.photo(project),
        view.pictures(project),
        view.downloads(project, project.asks[0]),
        view.edit_files([project]),
        view.line(evil, bad=True),
        view.bar(job, studio.machine.card, evil),
    ]
    for part in parts:
        assert "<img src=x" not in part and "\u202e" not in part and 'onerror="' not in part


def test_several_seeds_are_a_row_each(visitors, monkeypatch):
    """A sentence is asked from every seed; each seed's pictures are a row along eta, and all names tell the seed."""
    studio, orders = Studio({"demo": "demo"}, "cpu"), []
    monkeypatch.setattr(studio, "_begin", lambda *begun: orders.append((begun[2], begun[4])))
    visitor = visitors.of("a" * 32)
    project = visitor.add_project("cat")
    project.edit, project.model, project.etas = "token", "demo", (0.0, 1.0)
    ask = studio.ask(visitor, project, "a cat", {"seeds": "0,3"})
    [(order, on_event)] = orders
    assert order["cells"] == [(0, 1.0), (3, 1.0), (0, 0.0), (3, 0.0)]
    for seed, eta in order["cells"]:
        on_event({"event": "picture", "seed": seed, "eta": eta, "name": f"{seed}-{eta}", "size": [8, 8]})
    names = [[ask.name_of(one) for one in row] for row in ask.rows]
    assert names == [["eta 0, seed 0", "eta 1, seed 0"], ["eta 0, seed 3", "eta 1, seed 3"]]
    page = view.pictures(project)
    assert page.count('role="list"') == 2 and all(name in page for row in names for name in row)
    assert [name in view.downloads(project, ask) for row in names for name in row] == [True] * 4
    # A finer step is rendered from all of them.
    studio.finer(visitor, project, project.asks[-1], 0.5)
    assert orders[-1][0]["cells"] == [(0, 0.5), (3, 0.5)]
    alone = studio.ask(visitor, project, "a cat", {})
    assert orders[-1][0]["cells"] == [(None, 1.0), (None, 0.0)] and alone.label == "a cat"


class Rendering(Studio):
    """A studio whose card renders the cells of each order, one order for each `release`."""

    def __init__(self) -> None:
        super().__init__({"demo": "demo"}, "cpu")
        self.orders: list[list[tuple[int | None, float]]] = []
        self.ends: SimpleQueue[Mapping[str, Any]] = SimpleQueue()
        self.machine.card = queue_of(self._play)

    def _play(self, job: Job) -> None:
        self.orders.append(job.order["cells"])
        end = self.ends.get(timeout=60)
        if end["event"] == "done":
            for seed, eta in job.order["cells"]:
                job.on_event({"event": "picture", "seed": seed, "eta": eta, "name": f"{seed}-{eta}"})
        job.take(end)

    def release(self, project: Project, end: str = "done") -> None:
        """Ends the job of a project, and waits until its end is booked."""
        job = project.job
        assert job is not None
        self.ends.put({"event": end, "result": None, "text": "out of memory"})
        assert job.ended.wait(60)


@pytest.fixture
def asked(visitors: Visitors) -> tuple[Rendering, Visitor, Project]:
    """A studio at work on the first sentence of an edit."""
    studio, visitor = Rendering(), visitors.of("a" * 32)
    project = visitor.add_project("cat")
    project.edit, project.model, project.etas = "token", "demo", (0.0, 1.0)
    studio.ask(visitor, project, "a cat", {"seeds": "0,3"})
    return studio, visitor, project


def test_the_last_eta_let_go_at_work_is_rendered_after_it(asked):
    """While the card is at work the page says which eta waits; the last one alone is rendered then."""
    studio, visitor, project = asked
    for eta in (0.3, 0.35):
        studio.finer(visitor, project, project.asks[-1], eta)
        assert f"eta {eta} waits for the card" in view.pictures(project)
    studio.release(project)
    assert "waits" not in view.pictures(project)
    studio.release(project)
    assert not project.busy and studio.orders[1:] == [[(0, 0.35), (3, 0.35)]]
    # In the row already, and in the row by the end of the job.
    studio.finer(visitor, project, project.asks[-1], 0.35)
    assert not project.busy
    studio.ask(visitor, project, "a dog", {})
    for eta in (0.3, 1.0):
        studio.finer(visitor, project, project.asks[-1], eta)
    studio.release(project)
    assert not project.busy and len(studio.orders) == 3


def test_uploads_are_taken_all_or_none(visitors):
    """Of uploads that are named twice, taken before or another's, none is taken."""
    visitor = visitors.of("a" * 32)
    visitor.uploads = {"one": 1, "two": 2}
    for paths in (["one", "one"], ["one", "other"]):
        with pytest.raises(Refused, match="upload the file again"):
            visitor.claim_uploads(paths)
        assert visitor.uploads == {"one": 1, "two": 2}
    visitor.claim_uploads(["one", "two"])
    with pytest.raises(Refused):
        visitor.claim_uploads(["two"])


def test_a_sentence_that_is_asked_twice_is_rendered_once(asked):
    """Enter and a click on "Ask" are one question; another sentence meanwhile is refused, not lost."""
    studio, visitor, project = asked
    again: tuple[Any, ...] = (visitor, project, " a  cat", {"seeds": "0,3"})
    assert studio.ask(*again) is project.asks[-1]
    with ThreadPoolExecutor(9) as threads:
        assert len({id(one) for one in threads.map(lambda _: studio.ask(*again), range(9))}) == 1
    with pytest.raises(Refused, match="at work"):
        studio.ask(visitor, project, "a dog", {})
    with pytest.raises(Refused, match="at work"):
        studio.ask(visitor, project, "a cat", {})
    studio.release(project)
    assert not project.busy and len(studio.orders) == len(project.asks) == 1
    # What is being stopped is not being rendered.
    studio.ask(visitor, project, "a dog", {})
    while len(studio.orders) < 2:
        time.sleep(0.01)
    studio.stop(project)
    with pytest.raises(Refused, match="at work"):
        studio.ask(visitor, project, "a dog", {})
    studio.release(project, "stopped")


def test_an_eta_does_not_wait_in_vain(asked):
    """A stop forgets the waiting eta, a failure says that it was not rendered, and a training lets none wait."""
    studio, visitor, project = asked
    studio.release(project)
    studio.finer(visitor, project, project.asks[-1], 0.5)
    studio.finer(visitor, project, project.asks[-1], 0.6)
    studio.release(project, "failed")
    assert not project.busy and project.message == "out of memory; eta 0.6 was not rendered"
    studio.finer(visitor, project, project.asks[-1], 0.5)
    studio.finer(visitor, project, project.asks[-1], 0.6)
    studio.stop(project)
    studio.release(project, "stopped")
    assert not project.busy and "waits" not in view.pictures(project)
    project.job = Job({"work": "train"}, "training")
    with pytest.raises(Refused, match="in training"):
        studio.finer(visitor, project, project.asks[-1], 0.5)


def test_a_plan_has_the_time_of_the_last_training(visitors):
    """As soon as a training has ended its time takes the estimate's place; one that went on after a stop does not."""
    studio, visitor = Studio({"demo": "demo"}, "cpu"), visitors.of("a" * 32)
    project = visitor.add_project("cat")
    project.photo = project.folder / "photo"

    def play(job: Job) -> None:
        job.on_event({"event": "trained", "etas": [0, 1], "start_sentence": "a cat"})
        job.take({"event": "done", "result": None})

    studio.machine.card = queue_of(play)
    plan = TrainingPlan("demo", "fast", fits=True, fit="fits: 1.0 of 8 GB", seconds=25.0, sizes="")
    for paused in (True, False):
        assert studio.plan_words(plan) == "fits: 1.0 of 8 GB, about 25 s"
        project.paused = paused
        assert studio.train(visitor, project, {"preset": "fast"}, "demo", []).ended.wait(60)
    assert studio.plan_words(plan) == "fits: 1.0 of 8 GB, about 1 s, as last time"
    tight = TrainingPlan("demo", "fast", fits=False, fit="does not fit: 9 GB", seconds=None, sizes="")
    assert studio.plan_words(tight) == "does not fit: 9 GB"


def test_a_stopped_training_is_found_again_however_much_memory_is_free(tiny_folder, tmp_path, monkeypatch):
    """The saved state of a training belongs to its settings, and not to the plan for the memory that is free; the base
    that trained an edit renders it, too, without a second loading."""
    from lowmem_imagic.batch.stopping import Stop
    from lowmem_imagic.settings.text import BaseOptions
    from lowmem_imagic.ui import work
    from lowmem_imagic.ui.told import Told

    class EnoughError(Exception):
        """The key is known."""

    keys = []

    def saved(path: Path, key: str) -> None:
        keys.append(key)
        raise EnoughError

    monkeypatch.setattr(work.training_state, "saved", saved)
    Image.new("RGB", (40, 30), "red").save(tmp_path / "photo.png")
    order = {"photo": tmp_path / "photo.png", "folder": str(tmp_path), "model": str(tiny_folder), "device": "cpu"}
    works = work.Work()
    for rows, rank in ((32, 2), (16, 2), (16, 3)):

        def fit(base: Any, config: Any, *_: Any, rows: int = rows) -> Any:
            return replace(config, sample=replace(config.sample, batch_rows=rows)), None

        monkeypatch.setattr(work, "fit_memory", fit)
        values = {"preset": "fast", "vram": "8GB", "rank": rank}
        with pytest.raises(EnoughError):
            works._train({**order, "sentences": ["a cat"], "values": values}, Told(lambda _: None, Stop()))
    assert keys[0] == keys[1] != keys[2]
    loaded = works._load(BaseOptions(model=str(tiny_folder), device="cpu"))
    assert works._load(BaseOptions(model=str(tiny_folder), device="cpu", weights="int8")) is loaded


def test_a_plan_is_for_the_base_as_it_is_chosen(monkeypatch):
    """The line about memory is for the chosen format of the base, and for checkpointing if it is chosen."""
    from lowmem_imagic.ui import work
    from lowmem_imagic.ui.told import Told

    told, counted = list[Any](), work.plans
    monkeypatch.setattr(work, "plans", lambda *words, **more: told.append(more) or counted(*words, **more))
    for values in ({}, {"base_weights": "fp32", "checkpointing": True}):
        order = {"model": "demo", "vram": "8GB", "speed": None, "size": None, "values": {"preset": "fast", **values}}
        assert work.Work()._plan(order, cast(Told, None))["peak_bytes"] > 0
    assert [(one["weights"], one["checkpointing"]) for one in told] == [("int8", False), ("fp32", True)]


@pytest.fixture
def stopped(visitors: Visitors, tmp_path: Path) -> tuple[Studio, Visitor, list[Mapping[str, Any]]]:
    """A studio in which a visitor's batch was stopped before its base was loaded, and the requests of its batches."""
    studio, visitor, requests = Studio({"demo": "demo"}, "cpu"), visitors.of("a" * 32), []

    def play(job: Job) -> None:
        requests.append(job.order["request"])
        ended = {"event": "done", "result": {"failed": 0}} if len(requests) > 1 else {"event": "stopped"}
        job.take(ended)

    studio.machine.card = studio.batches._machine.card = queue_of(play)
    upload = tmp_path / "upload" / "cat.png"
    upload.parent.mkdir()
    upload.write_bytes(b"x")
    visitor.uploads[str(upload)] = 1
    batch = studio.batches.begin(visitor, [(str(upload), "cat.png")], ["a cat"], {"preset": "fast"}, "demo")
    assert batch.job is not None and batch.job.ended.wait(60)
    return studio, visitor, requests


def test_a_batch_that_had_not_begun_is_continued(stopped, visitors, tmp_path):
    """A batch that was stopped while it waited goes on with the same request, also in another run of the server."""
    studio, visitor, requests = stopped
    [batch] = Visitors(tmp_path / "visitors", tmp_path / "out").of("a" * 32).batches.values()
    assert batch.unfinished and not batch.results.exists()
    studio.batches.resume(visitor, batch)
    assert batch.job is not None and batch.job.ended.wait(60)
    assert requests[0] == requests[1] and requests[0]["preset"] == "fast"
    [again] = visitor.batches.values()
    (again.path / "request.json").unlink()
    again.photos.mkdir()
    with pytest.raises(Refused, match="never began and cannot be continued; begin it again") as refused:
        studio.batches.resume(visitor, again)
    assert str(tmp_path) not in str(refused.value)


def test_a_finished_batch_is_not_begun_again(stopped):
    """The photos of a finished batch are deleted: to go on with it would make failures of what is done."""
    studio, visitor, requests = stopped
    [batch] = visitor.batches.values()
    studio.batches.resume(visitor, batch)
    assert batch.job.ended.wait(60) and not batch.unfinished and not batch.photos.exists()
    with pytest.raises(Refused, match="this batch is finished"):
        studio.batches.resume(visitor, batch)
    assert len(requests) == 2


def test_packed_results_take_room_once(stopped, monkeypatch):
    """Results that are packed anew, or removed, leave no earlier file behind."""
    studio, visitor, _ = stopped
    [batch] = visitor.batches.values()
    monkeypatch.setattr(studio.batches, "files", lambda _: {"page": Path(__file__)})
    monkeypatch.setattr(studio.machine, "quickly", lambda _, order, __: Path(order["out"]).write_bytes(b"x"))
    for _ in range(2):
        studio.batches.pack(visitor, batch)
        assert len(list(visitor.folder.glob("*.zip"))) == 1 and batch.packed in visitor.files
    studio.batches.remove(visitor, batch)
    assert not list(visitor.folder.glob("*.zip")) and batch.packed not in visitor.files


def test_a_photo_is_removed_with_all_that_was_made_of_it(visitors):
    """A removed photo makes room; one that is at work stays."""
    studio, visitor = Studio({"demo": "demo"}, "cpu"), visitors.of("a" * 32)
    project = visitor.add_project("cat")
    (project.folder / "edit").write_bytes(b"x")
    project.job = Job({"work": "train"}, "training")
    with pytest.raises(Refused, match="at work; stop it first"):
        studio.remove(visitor, project)
    project.job = None
    studio.remove(visitor, project)
    assert not visitor.projects and not project.folder.exists() and not visitor.bytes


def test_bases_of_equal_names_are_told_apart(tmp_path, monkeypatch):
    """Two folders of one name are two bases on the page, and so is a folder with the bundled model's name."""
    from lowmem_imagic.ui.app import _labelled

    monkeypatch.chdir(tmp_path)
    for name in ("a/model", "b/model", "demo"):
        (tmp_path / name).mkdir(parents=True)
    expected = {"model": "a/model", "model (2)": "b/model", "sd15": "sd15", "demo": "./demo", "demo (2)": "demo"}
    assert _labelled(["a/model", "b/model", "sd15", "./demo", "a/model", "demo"]) == expected


@pytest.mark.process
def test_a_page_needs_no_torch():
    """The page's own process imports no model library, so it starts at once and holds no memory of a card."""
    script = "import sys, lowmem_imagic.ui.app\nassert not {'torch', 'diffusers', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True)


def test_what_cannot_be_asked_is_refused(visitors):
    """A sentence needs an edit, words, and few seeds; a base is one of the list, and a batch needs both its lists."""
    studio = Studio({"demo": "demo"}, "cpu", hub=False)
    visitor = visitors.of("a" * 32)
    project = visitor.add_project("cat")
    with pytest.raises(Refused, match="no edit to ask"):
        studio.ask(visitor, project, "a cat", {})
    with pytest.raises(Refused, match="no photo to train on"):
        studio.train(visitor, project, {"preset": "fast"}, "demo", [])
    project.edit, project.model = "token", "demo"
    with pytest.raises(PromptError, match="the sentence is empty"):
        studio.ask(visitor, project, " \n ", {})
    with pytest.raises(ConfigError, match="`seeds` has 9 numbers, expected at most 8"):
        studio.ask(visitor, project, "a cat", {"seeds": "0,1,2,3,4,5,6,7,8"})
    for model in ("sd15", "/etc", "demo/../demo", ""):
        with pytest.raises(Refused, match="no such base here"):
            studio.choose_base(visitor, project, model)
    with pytest.raises(Refused, match="one photo or more, and one sentence or more"):
        studio.batches.begin(visitor, [], ["a cat"], {}, "demo")
    with pytest.raises(Refused, match="no such base here"):
        studio.batches.begin(visitor, [("upload", "cat.png")], ["a cat"], {}, "sd15")
    # A batch that does not begin leaves nothing behind.
    assert not visitor.batches
    with pytest.raises(Refused, match="does not use its owner's account"):
        studio.push(visitor, project, "me/cat", public=True, agreed=True)
