"""A server that speaks the Hugging Face Hub's protocol for repositories of models, on this machine."""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_of_the_tests"
OWNER = "someone"


@dataclass
class Repo:
    """A repository: its commits, oldest first, each with all its files."""

    private: bool
    commits: list[tuple[str, dict[str, bytes]]] = field(default_factory=list)

    def at(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """The commit of a name, or of the main branch."""
        if revision == "main":
            return self.commits[-1]
        return next((commit for commit in self.commits if commit[0] == revision), None)

    def commit(self, files: dict[str, bytes]) -> str:
        """Adds a commit with these files; returns its name."""
        seen = f"{len(self.commits)} {sorted((n, hashlib.sha256(d).hexdigest()) for n, d in files.items())}"
        oid = hashlib.sha1(seen.encode()).hexdigest()
        self.commits.append((oid, files))
        return oid


@dataclass
class Hub:
    """What the server has, and what it was asked."""

    endpoint: str = ""
    repos: dict[str, Repo] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)
    """Large files that were uploaded, by SHA-256."""
    asked: list[str] = field(default_factory=list)
    """The requests, as ``METHOD /path``."""
    cards: dict[str, str] = field(default_factory=dict)
    """Licences of models that have a card and no files here."""
    sizes: dict[str, int] = field(default_factory=dict)
    """Sizes that the server states for files, instead of their own."""

    def add(self, name: str, files: dict[str, bytes], *, private: bool = False) -> str:
        """Adds a commit to a repository, which is made if it is not there; returns the commit's name."""
        repo = self.repos.setdefault(name, Repo(private))
        return repo.commit(files)


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        """Prints nothing."""

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _send(self, status: int, body: bytes | dict[str, Any] = b"", headers: dict[str, str] | None = None) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Type", "application/octet-stream" if isinstance(body, bytes) else "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _fail(self, status: int, code: str = "", message: str = "") -> None:
        self._send(status, {"error": message}, {"X-Error-Code": code, "X-Error-Message": message})

    @property
    def _known(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def _repo(self, name: str) -> Repo | None:
        """A repository that this client may see; otherwise the answer is sent."""
        repo = self.hub.repos.get(name)
        if repo is None or (repo.private and not self._known):
            self._fail(404 if self._known else 401, "RepoNotFound", "Repository not found")
            return None
        return repo

    def _commit_at(self, name: str, revision: str) -> tuple[Repo, str, dict[str, bytes]] | None:
        """A repository that this client may see, with a commit's name and files; otherwise the answer is sent."""
        if (repo := self._repo(name)) is None:
            return None
        if (commit := repo.at(revision)) is None:
            self._fail(404, "RevisionNotFound", "Revision not found")
            return None
        return repo, *commit

    def _path(self) -> str:
        path = unquote(urlsplit(self.path).path)
        self.hub.asked.append(f"{self.command} {path}")
        return path

    def do_GET(self) -> None:
        path = self._path()
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path):
            return self._info(match[1], match[2] or "main")
        if match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            return self._file(*match.groups())
        return self._fail(404)

    do_HEAD = do_GET

    def _info(self, name: str, revision: str) -> None:
        if name in self.hub.cards and name not in self.hub.repos:
            card = {"license": self.hub.cards[name]}
            return self._send(200, {"id": name, "cardData": card, "siblings": [], "private": False, "tags": []})
        if (commit := self._commit_at(name, revision)) is None:
            return None
        repo, oid, files = commit
        siblings = [{"rfilename": n, "size": self.hub.sizes.get(n, len(d)), "blobId": oid} for n, d in files.items()]
        return self._send(
            200, {"id": name, "sha": oid, "private": repo.private, "siblings": siblings, "tags": [], "gated": False}
        )

    def _file(self, name: str, revision: str, file: str) -> None:
        if (commit := self._commit_at(name, revision)) is None:
            return None
        _, oid, files = commit
        if file not in files:
            return self._fail(404, "EntryNotFound", "Entry not found")
        etag = f'"{hashlib.sha256(files[file]).hexdigest()}"'
        return self._send(200, files[file], {"X-Repo-Commit": oid, "ETag": etag, "X-Linked-Etag": etag})

    def do_PUT(self) -> None:
        path, body = self._path(), self._body()
        self.hub.blobs[path.rpartition("/")[2]] = body
        self._send(200)

    def do_POST(self) -> None:
        path, body = self._path(), self._body()
        if not self._known:
            return self._fail(401, "", "Invalid username or password.")
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/main", path):
            return self._modes(match[1], json.loads(body))
        if match := re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            return self._uploads(json.loads(body))
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/main", path):
            return self._commit(match[1], body)
        if path == "/api/validate-yaml":
            return self._send(200, {"errors": [], "warnings": []})
        return self._fail(404)

    def _create(self, asked: dict[str, Any]) -> None:
        if asked["organization"] not in (None, OWNER):
            return self._fail(403, "", "You don't have the rights")
        name = f"{OWNER}/{asked['name']}"
        if name in self.hub.repos:
            return self._fail(409, "", "You already created this model repo")
        private = asked.get("visibility") == "private" or bool(asked.get("private"))
        self.hub.add(name, {".gitattributes": b"*.safetensors filter=lfs\n"}, private=private)
        return self._send(200, {"url": f"{self.hub.endpoint}/{name}", "name": name, "id": name})

    def _modes(self, name: str, asked: dict[str, Any]) -> None:
        if self._repo(name) is None:
            return
        modes = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                "shouldIgnore": False,
                "oid": None,
            }
            for file in asked["files"]
        ]
        self._send(200, {"files": modes})

    def _uploads(self, asked: dict[str, Any]) -> None:
        objects = [
            {
                "oid": one["oid"],
                "size": one["size"],
                "actions": {"upload": {"href": f"{self.hub.endpoint}/uploads/{one['oid']}", "header": {}}},
            }
            for one in asked["objects"]
        ]
        self._send(200, {"transfer": "basic", "objects": objects})

    def _commit(self, name: str, body: bytes) -> None:
        repo = self._repo(name)
        if repo is None:
            return None
        oid, files = repo.commits[-1]
        files = dict(files)
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header" and value.get("parentCommit", oid) != oid:
                return self._fail(412, "", "A commit has happened since")
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            if entry["key"] == "lfsFile":
                files[value["path"]] = self.hub.blobs[value["oid"]]
            if entry["key"] == "deletedFile":
                del files[value["path"]]
        oid = repo.commit(files)
        return self._send(
            200, {"success": True, "commitOid": oid, "commitUrl": f"{self.hub.endpoint}/{name}/commit/{oid}"}
        )


@contextmanager
def serving() -> Iterator[Hub]:
    """A Hub at its `endpoint` on this machine's loopback address."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
