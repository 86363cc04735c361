"""The studio under hostile requests: a thousand of them, and none ends in a traceback, a path or another's file."""

import json
import random
import re
import struct
import zlib
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("gradio")
httpx = pytest.importorskip("httpx")

from tests.studio_server import served  # noqa: E402

pytestmark = pytest.mark.browser

_NAMES = (
    "cat.png",
    "../../etc/passwd",
    "a\r\nSet-Cookie: x=y",
    "",
    "x" * 3000,
    "\u202egnp.exe",
    "con.png",
    "<b>.png",
    "\0.png",
)
_PATHS = (
    "/gradio_api/file=/etc/passwd",
    "/gradio_api/file=C:\\Windows\\win.ini",
    "/gradio_api/file=..%2f..%2fetc/passwd",
    "//gradio_api/file=/etc/passwd",
    "/GRADIO_API/FILE=/etc/passwd",
    "/studio/file/..%2f..%2f..%2fetc%2fpasswd",
    "/studio/file/" + "A" * 5000,
    "/studio/batch/batch-001/../../../../etc/passwd",
    "/studio/batch/..%2f../list.jsonl",
    "/assets/../../../../etc/passwd",
    "/static/..%2f..%2fpyproject.toml",
    "/gradio_api/upload_progress?upload_id=x",
    "/gradio_api/heartbeat/../../x",
    "/gradio_api/queue/data?session_hash=someone",
    "/?__theme=%00&view=../../x",
    "/config?deep_link=../../etc/passwd",
    "/pwa_icon/../../x",
)


def _pictures(draws: random.Random) -> Iterator[bytes]:
    """Files that may harm a decoder: bombs, damage in every format, lies about sizes, other kinds of files."""
    image = Image.fromarray(np.add.outer(np.arange(40), np.arange(60)).astype(np.uint8)).convert("RGB")
    sound = []
    for kind in ("PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF", "JPEG2000", "PPM", "AVIF"):
        buffer = BytesIO()
        image.save(buffer, kind)
        sound.append(buffer.getvalue())

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    large = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    bomb = (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", large) + chunk(b"IDAT", zlib.compress(bytes(10**6))) + chunk(b"IEND", b"")
    )
    others = [
        bomb,
        b"",
        b"\0" * 5000,
        b"<svg onload='alert(1)'/>",
        b"%!PS-Adobe-3.0 EPSF\n",
        b"PK\x03\x04",
        b"GIF89a",
        b"II*\0",
    ]
    while True:
        data = bytearray(draws.choice([*sound, *others]))
        for _ in range(draws.randrange(6)):
            if data:
                data[draws.randrange(len(data))] = draws.randrange(256)
        yield bytes(data[: draws.randrange(len(data) + 1)] if draws.random() < 0.3 else data)


class _Attacker:
    """A visitor who sends what no page sends."""

    def __init__(self, address: str, draws: random.Random) -> None:
        self.client = httpx.Client(base_url=address, timeout=600)
        self.draws, self.pictures = draws, _pictures(draws)
        self.client.get("/")
        config = self.client.get("/config").json()
        self.events = [one for one in config["dependencies"] if one["backend_fn"]]
        # The first upload is that of the photo.
        self.photo = next(one for one in self.events if ["upload"] in [[target[1]] for target in one["targets"]])
        self.count = 0

    def __enter__(self) -> "_Attacker":
        return self

    def __exit__(self, *error: object) -> None:
        self.client.close()

    def answer(self, method: str, path: str, **sent: Any) -> Any:
        """The answer to a request, which is checked."""
        self.count += 1
        answer = self.client.request(method, path, **sent)
        assert answer.status_code < 500, (method, path, answer.status_code)
        check(answer.text)
        return answer

    def upload(self) -> Any:
        """Uploads a hostile file under a hostile name; returns its path, if it was taken."""
        name = self.draws.choice(_NAMES)
        answer = self.answer("POST", "/gradio_api/upload", files={"files": (name, next(self.pictures), "image/png")})
        return answer.json()[0] if answer.status_code == 200 else "/etc/passwd"

    def act(self, event: Any, data: Any) -> None:
        """Sends an event of the page, and reads what it leads to."""
        session = f"s{self.count}"
        body = json.dumps({"data": data, "fn_index": event["id"], "session_hash": session, "trigger_id": None})
        if self.answer("POST", "/gradio_api/queue/join", content=body.encode()).status_code == 200:
            self.answer("GET", f"/gradio_api/queue/data?session_hash={session}")

    def junk(self) -> Any:
        """A value that no field has."""
        values = [None, 0, -1, 1e308, "", "x" * 2000, [], {}, True, "../../etc/passwd", {"path": "/etc/passwd"}]
        values += [{"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}}, [{"path": 3}], "\ud800", "\0", [[[]]]]
        return self.draws.choice(values)


def check(text: str) -> None:
    """Nothing in an answer of the server tells of its code or its files."""
    assert "Traceback" not in text and 'File "' not in text and "root:x:0" not in text
    assert not re.search(r"site-packages|/ui/[a-z]+\.py", text)


def test_a_thousand_hostile_requests(tmp_path: Path) -> None:
    """Hostile uploads, events and paths end in one line each, and the studio still works for the next visitor."""
    draws = random.Random(7)
    with served(tmp_path) as address, _Attacker(address, draws) as attacker, _Attacker(address, draws) as visitor:
        while attacker.count < 1000:
            kind = draws.random()
            if kind < 0.3:
                file = {"path": attacker.upload(), "meta": {"_type": "gradio.FileData"}}
                attacker.act(attacker.photo, [file])
            elif kind < 0.6:
                event = draws.choice(attacker.events)
                count = draws.choice([len(event["inputs"])] * 4 + [0, 1, 50])
                attacker.act(event, [attacker.junk() for _ in range(count)])
            elif kind < 0.8:
                attacker.answer(draws.choice(["GET", "GET", "POST", "HEAD", "PUT"]), draws.choice(_PATHS))
            else:
                body = json.dumps(
                    {"data": [attacker.junk()], "fn_index": attacker.junk(), "session_hash": attacker.junk()}
                )
                cut = body.encode(errors="replace")[: draws.randrange(len(body) + 1)]
                attacker.answer("POST", "/gradio_api/queue/join", content=cut)
        image = BytesIO()
        Image.new("RGB", (40, 30), "red").save(image, "PNG")
        path = visitor.client.post("/gradio_api/upload", files={"files": ("cat.png", image.getvalue())}).json()[0]
        body = {
            "data": [{"path": path, "meta": {"_type": "gradio.FileData"}}],
            "fn_index": visitor.photo["id"],
            "session_hash": "x",
        }
        assert visitor.client.post("/gradio_api/queue/join", json=body).status_code == 200
        assert "40 x 30 px" in visitor.client.get("/gradio_api/queue/data?session_hash=x").text
