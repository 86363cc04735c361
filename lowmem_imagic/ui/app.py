"""The studio as a web application: the page, the files of its visitors, and the guard before both."""

import threading
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

import gradio as gr
from fastapi import FastAPI, Request
from starlette.responses import FileResponse, PlainTextResponse, Response

from .guard import COOKIE, Guard
from .limits import MAX_PHOTO_BYTES
from .page import SCRIPT, STYLE, page_of
from .studio import BUNDLED, Studio
from .visitors import Visitors

_SWEEP_S = 30.0
_MAX_MB = MAX_PHOTO_BYTES >> 20


class Running:
    """The studio with its processes, for a ``with`` block.

    Args:
        models: bases to offer beside the bundled one.
        device: device of the bases.
        folder: parent of the visitors' folders.
        out: parent of the batches' folders.
        port: port of the server.
        password: asked of everybody; None asks nobody and answers loopback addresses alone.
    """

    def __init__(
        self, models: Sequence[str], *, device: str, folder: Path, out: Path, port: int, password: str | None
    ) -> None:
        self.studio = Studio(_labelled([*models, BUNDLED]), device, hub=password is None)
        self.visitors = Visitors(folder, out)
        self._ended = threading.Event()
        page = page_of(self.studio, self.visitors)
        site = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
        site.add_api_route("/studio/file/{token}", self._file, methods=["GET"], include_in_schema=False)
        fonts = ["system-ui", "sans-serif"]
        site.add_api_route(
            "/studio/batch/{name}/{file:path}", self._batch_file, methods=["GET"], include_in_schema=False
        )
        gr.mount_gradio_app(
            site,
            page,
            path="",
            footer_links=[],
            show_error=False,
            max_file_size=f"{_MAX_MB}mb",
            ssr_mode=False,
            theme=gr.themes.Default(font=fonts, font_mono=["ui-monospace", "monospace"]),
            css=STYLE,
            head=SCRIPT,
        )
        hosts = None if password else frozenset(f"{name}:{port}" for name in ("127.0.0.1", "localhost"))
        self.app = Guard(site, self.visitors, hosts, password)

    def __enter__(self) -> "Running":
        self.studio.start()
        threading.Thread(target=self._sweep, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._ended.set()
        self.studio.close()

    def _sweep(self) -> None:
        """Deletes the files of visitors who have left, now and then."""
        while not self._ended.wait(_SWEEP_S):
            self.visitors.sweep()

    def _file(self, token: str, request: Request) -> Response:
        """A file of the visitor's table; the token is only looked up."""
        visitor = self.visitors.of(str(request.cookies[COOKIE]))
        served = visitor.files.get(token)
        if served is None or not served.path.is_file():
            return PlainTextResponse("there is no such file for you", 404)
        headers = {"Cache-Control": "private, max-age=3600"}
        return FileResponse(served.path, media_type=served.media_type, filename=served.download, headers=headers)

    def _batch_file(self, name: str, file: str, request: Request) -> Response:
        """A result of a batch; both names are only looked up."""
        visitor = self.visitors.of(str(request.cookies[COOKIE]))
        batch = visitor.batches.get(name)
        path = None if batch is None else self.studio.batches.files(batch).get(file)
        if path is None:
            return PlainTextResponse("there is no such file for you", 404)
        return FileResponse(path, headers={"Cache-Control": "private, no-cache"})


def _labelled(names: Sequence[str]) -> dict[str, str]:
    """Bases by their names on the page, in their order; equal ones are numbered."""
    labelled: dict[str, str] = {}
    for name in dict.fromkeys(names):
        label, number = _label(name), 1
        while label in labelled:
            number += 1
            label = f"{_label(name)} ({number})"
        labelled[label] = name
    return labelled


def _label(name: str) -> str:
    """The name of a base on the page: no folder of this machine."""
    return Path(name).name if Path(name).exists() else name
