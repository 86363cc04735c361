"""The door of the studio's server: which requests pass, whose they are, and what they may carry.

It stands before the page's library, which has more routes than the studio needs. Only the listed routes pass. A path in
a request passes only if it is an upload of the same visitor, so none of another's is opened.
"""

import base64
import contextlib
import hmac
import json
import secrets
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping
from http.cookies import CookieError, SimpleCookie
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

from starlette.responses import PlainTextResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..plain_text import shown
from ..unexpected import first_line
from . import limits
from .visitors import Visitor, Visitors

COOKIE = "lowmem_imagic_visitor"
_API = "/gradio_api"
_UPLOAD, _JOIN, _DATA = f"{_API}/upload", f"{_API}/queue/join", f"{_API}/queue/data"
_GET = {"/", "/config", "/theme.css", "/favicon.ico", "/manifest.json", _DATA, f"{_API}/upload_progress"}
_GET |= {f"{_API}/info", f"{_API}/startup-events", f"{_API}/theme.css", f"{_API}/app_id", "/robots.txt"}
_HEARTBEAT = f"{_API}/heartbeat/"
_GET_UNDER = ("/static/", "/assets/", _HEARTBEAT, "/studio/", "/pwa_icon")
_PUBLIC = ("/static/", "/assets/", "/theme.css", "/favicon.ico", "/manifest.json", "/robots.txt", "/pwa_icon")
_POST = {_UPLOAD, _JOIN}
_HEADERS = {
    # The page's library has scripts and styles in its page; nothing is fetched from elsewhere.
    b"content-security-policy": b"default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; "
    b"style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self'; "
    b"object-src 'none'; base-uri 'self'; form-action 'self'; frame-ancestors 'none'",
    b"x-content-type-options": b"nosniff",
    b"referrer-policy": b"no-referrer",
    b"cross-origin-resource-policy": b"same-origin",
}
_MAX_FAILURES, _FAILURES_S = 10, 60.0
_MAX_FIELDS = 10_000
_MONTH_S = 30 * 24 * 3600


class Guard:
    """The door; see the module.

    Args:
        app: everything behind it.
        visitors: all visitors.
        hosts: names of this server in requests; None for any, where a password is asked.
        password: asked of everybody by HTTP's basic authentication; None asks nobody.
    """

    def __init__(self, app: ASGIApp, visitors: Visitors, hosts: frozenset[str] | None, password: str | None) -> None:
        self._app, self._visitors, self._hosts, self._password = app, visitors, hosts, password
        self._sessions: dict[str, str] = {}
        """The visitor of each tab."""
        self._failures: dict[str, deque[float]] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes a request on, or refuses it."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        refusal = self._refusal(scope)
        if refusal is not None:
            await refusal(scope, receive, send)
            return
        cookie, new = _cookie_of(scope), False
        if cookie is None and scope["path"] not in ("/", "/config") and not scope["path"].startswith(_PUBLIC):
            await _no(403, "load the page first; it works with a cookie of its own")(scope, receive, send)
            return
        if cookie is None:
            cookie, new = self._visitors.new_cookie(), True
            # Handlers read the cookie from the request.
            scope["headers"] = [(name, value) for name, value in scope["headers"] if name != b"cookie"]
            scope["headers"].append((b"cookie", f"{COOKIE}={cookie}".encode()))
        visitor = self._visitors.of(cookie)

        begun = False

        async def answer(message: Message) -> None:
            nonlocal begun
            begun = True
            if message["type"] == "http.response.start":
                headers = [(name, value) for name, value in message["headers"] if name.lower() not in _HEADERS]
                headers += [(name, value) for name, value in _HEADERS.items()]
                if new and scope["path"] == "/":
                    # Not sent with requests from other sites.
                    value = f"{COOKIE}={cookie}; Path=/; Max-Age={_MONTH_S}; HttpOnly; SameSite=Strict"
                    headers.append((b"set-cookie", value.encode()))
                message = {**message, "headers": headers}
            await send(message)

        try:
            await self._pass_on(visitor, scope, receive, answer)
        except Exception as error:  # a request that the page's library does not expect is no fault of the studio
            print(f"lowmem-imagic: a request to the studio failed: {shown(first_line(error))}", file=sys.stderr)
            if not begun:
                await _no(400, "the studio cannot do this")(scope, receive, answer)
            else:
                # It has ended already, or ends here.
                with contextlib.suppress(Exception):
                    await answer({"type": "http.response.body", "body": b""})

    async def _pass_on(self, visitor: Visitor, scope: Scope, receive: Receive, answer: Send) -> None:
        path = scope["path"]
        if path == _UPLOAD:
            await self._upload(visitor, scope, receive, answer)
        elif path == _JOIN:
            await self._join(visitor, scope, receive, answer)
        elif path.startswith(_HEARTBEAT):
            # Open as long as the tab is.
            visitor.tabs += 1
            try:
                await self._app(scope, receive, answer)
            finally:
                visitor.tabs -= 1
                self._visitors.of(visitor.cookie)
        elif path == _DATA and not self._owns_session(visitor, _query(scope, "session_hash")):
            await _no(403, "this tab is another visitor's; load the page again")(scope, receive, answer)
        else:
            await self._app(scope, receive, answer)

    def _refusal(self, scope: Scope) -> Response | None:
        """The answer to a request that does not pass, before anything of it is read."""
        if scope["type"] != "http":
            return _no(404, "not here")
        headers = _headers(scope)
        host = headers.get("host", "")
        # A page elsewhere may point its own name at this machine (DNS rebinding).
        if self._hosts is not None and host not in self._hosts:
            return _no(403, "the studio is open under its own address alone")
        if self._password is not None and (refusal := self._check_password(scope, headers)) is not None:
            return refusal
        path, method = scope["path"], scope["method"]
        origin = headers.get("origin")
        if method == "POST" and origin is not None and origin.partition("://")[2] != host:
            return _no(403, "requests from other sites are refused")
        if method in ("GET", "HEAD") and (path in _GET or path.startswith(_GET_UNDER)):
            return None
        if method == "POST" and path in _POST:
            return None
        return _no(404, "not here")

    def _check_password(self, scope: Scope, headers: Mapping[str, str]) -> Response | None:
        client = (scope.get("client") or ("",))[0]
        failures, now = self._failures.setdefault(client, deque(maxlen=_MAX_FAILURES)), time.monotonic()
        if len(failures) == _MAX_FAILURES and now - failures[0] < _FAILURES_S:
            return _no(429, "too many wrong passwords; wait a minute")
        kind, _, code = headers.get("authorization", "").partition(" ")
        try:
            word = base64.b64decode(code, validate=True).partition(b":")[2]
        except ValueError:
            word = b""
        assert self._password is not None
        if kind.lower() == "basic" and hmac.compare_digest(word, self._password.encode()):
            return None
        if code:
            failures.append(now)
        if len(self._failures) > 10_000:
            self._failures.clear()
        challenge = {"WWW-Authenticate": 'Basic realm="lowmem-imagic studio", charset="UTF-8"'}
        return PlainTextResponse("the studio asks for its password (any user name)", 401, challenge)

    def _owns_session(self, visitor: Visitor, session: str) -> bool:
        """Whether a tab is this visitor's; an unknown tab becomes it."""
        if len(self._sessions) > 100_000:
            self._sessions.clear()
        return self._sessions.setdefault(session, visitor.cookie) == visitor.cookie

    async def _upload(self, visitor: Visitor, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes an upload on if there is room for it, and books its files for the visitor."""
        length = _headers(scope).get("content-length", "")
        size = int(length) if length.isascii() and length.isdigit() and len(length) < 16 else -1
        if size < 0:
            await _no(411, "an upload must tell its length")(scope, receive, send)
            return
        # The limit of one file is checked by the page's library, part by part.
        if visitor.bytes + size > limits.MAX_UPLOADS_BYTES or self._visitors.bytes + size > limits.MAX_VISITORS_BYTES:
            await _no(413, "the studio has no room for this upload; remove photos or batches first")(
                scope, receive, send
            )
            return
        start: Message | None = None
        body = b""

        async def book(message: Message) -> None:
            nonlocal start, body
            if message["type"] == "http.response.start":
                start = message
                return
            body += message.get("body", b"")
            if message.get("more_body"):
                return
            assert start is not None
            if start["status"] >= 500:
                # Such as a name that no file can have.
                start, body = {**start, "status": 400}, b"the upload cannot be read; give the file a plain name"
            if start["status"] == 200:
                paths = [_renamed(path) for path in json.loads(body)]
                with visitor.lock:
                    visitor.uploads |= {path: size // len(paths) for path in paths}
                body = json.dumps(paths).encode()
            headers = [(name, value) for name, value in start["headers"] if name.lower() != b"content-length"]
            await send({**start, "headers": [*headers, (b"content-length", str(len(body)).encode())]})
            await send({**message, "body": body})

        await self._app(scope, receive, book)

    async def _join(self, visitor: Visitor, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes an event of the page on if it is well formed, of the visitor's own tab, and with own uploads alone."""
        body = await _body(receive)
        if body is None:
            await _no(413, f"a request has at most {limits.MAX_BODY_BYTES} bytes")(scope, receive, send)
            return
        try:
            event = json.loads(body)
            paths = list(_paths(event))
            # Addresses of files are of no use here; only the paths of uploads are.
            body = json.dumps(event).encode()
            session = event["session_hash"]
            sound = isinstance(session, str) and isinstance(event["data"], list) and isinstance(event["fn_index"], int)
        except (ValueError, LookupError, TypeError, RecursionError):
            sound = False
        if not sound:
            await _no(400, "the request is not of this page")(scope, receive, send)
            return
        if not self._owns_session(visitor, session):
            await _no(403, "this tab is another visitor's; load the page again")(scope, receive, send)
            return
        if any(not isinstance(path, str) or path not in visitor.uploads for path in paths):
            await _no(403, "the request names a file that is no upload of this visitor")(scope, receive, send)
            return

        async def again() -> Message:
            return {"type": "http.request", "body": body, "more_body": False}

        headers = [(name, value) for name, value in scope["headers"] if name != b"content-length"]
        scope["headers"] = [*headers, (b"content-length", str(len(body)).encode())]
        await self._app(scope, again, send)


def _renamed(path: str) -> str:
    """Moves an upload to a random folder: the page's library names folders by contents, so that equal uploads of two
    visitors have one path."""
    file = Path(path)
    folder = file.parent.parent / secrets.token_hex(16)
    folder.mkdir()
    return str(file.rename(folder / file.name))


def _paths(value: Any) -> Iterator[Any]:
    """Every path in a request that the page's library would open; addresses of files are removed from the request.

    Raises:
        ValueError: there are too many values.
    """
    left, count = [value], 0
    while left:
        one = left.pop()
        count += 1
        if count > _MAX_FIELDS:
            raise ValueError("too many values")
        if isinstance(one, dict):
            one.pop("url", None)
            if "path" in one:
                yield one["path"]
            left += one.values()
        elif isinstance(one, list):
            left += one


async def _body(receive: Receive) -> bytes | None:
    """The body of a request; None if it is too long."""
    body = b""
    while True:
        message = await receive()
        body += bytes(message.get("body", b""))
        if len(body) > limits.MAX_BODY_BYTES:
            return None
        if not message.get("more_body"):
            return body


def _headers(scope: Scope) -> dict[str, str]:
    return {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}


def _cookie_of(scope: Scope) -> str | None:
    """The visitor's cookie, if it looks like one of ours."""
    cookies: SimpleCookie = SimpleCookie()
    try:
        cookies.load(_headers(scope).get("cookie", ""))
    except CookieError:
        return None
    value = cookies[COOKIE].value if COOKIE in cookies else ""
    return value if len(value) == 32 and value.replace("-", "a").replace("_", "a").isalnum() else None


def _query(scope: Scope, name: str) -> str:
    query: bytes = scope["query_string"]
    return parse_qs(query.decode("latin-1")).get(name, [""])[0]


def _no(status: int, text: str) -> Response:
    return PlainTextResponse(text, status)
