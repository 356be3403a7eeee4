"""A hub on this machine: the part of the Hugging Face hub's protocol that reads models, over a folder."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

TOKEN = "hf_canary"  # noqa: S105 - a word to look for


@dataclass
class Hub:
    """Models by id; `gated` ones want the token. `asked` has every path that was asked for."""

    models: dict[str, Path]
    revision: str = "a" * 40
    gated: set[str] = field(default_factory=set)
    asked: list[str] = field(default_factory=list)
    url: str = ""


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.answer(body=False)

        def do_GET(self) -> None:
            self.answer(body=True)

        def log_message(self, *_: object) -> None:
            pass

        def answer(self, *, body: bool) -> None:
            path = self.path.partition("?")[0]
            hub.asked.append(f"{self.command} {path}")
            found = re.fullmatch(r"/(?:api/models/)?([^/]+/[^/]+)(?:/(revision|resolve)/([^/]+)(?:/(.+))?)?", path)
            name, _, revision, file = found.groups() if found else ("", "", None, None)
            folder = hub.models.get(name)
            if folder is None:
                return self.refuse(401, "RepoNotFound")
            if name in hub.gated and self.headers.get("Authorization") != f"Bearer {TOKEN}":
                return self.refuse(401, "GatedRepo")
            if revision not in (None, "main", hub.revision):
                return self.refuse(404, "RevisionNotFound")
            if file is None:
                siblings = [{"rfilename": p.name, "size": p.stat().st_size} for p in sorted(folder.iterdir())]
                siblings.append({"rfilename": "original/consolidated.00.pth", "size": 9})
                return self.give(json.dumps({"id": name, "sha": hub.revision, "siblings": siblings}).encode(), body)
            if not (folder / file).is_file():
                return self.refuse(404, "EntryNotFound")
            return self.give((folder / file).read_bytes(), body)

        def refuse(self, status: int, code: str) -> None:
            self.send_response(status)
            self.send_header("X-Error-Code", code)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def give(self, data: bytes, body: bool) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.send_header("X-Repo-Commit", hub.revision)
            self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
            self.end_headers()
            if body:
                self.wfile.write(data)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
