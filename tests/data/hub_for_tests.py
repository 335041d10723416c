"""A small hub on this host, from which the real client downloads; what tests of hub data sets share."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

REVISION = "b08601e04326c79dfdd32d625aee71d232d685c3"

# What users do on a machine with a network.
PREPARE = """
import sys
from datasets import load_dataset

load_dataset(*sys.argv[1:])
"""


def run(script: str, *arguments: str, home: Path, **environment: str) -> str:
    environment = {**os.environ, "HF_HOME": str(home), **environment}
    command = [sys.executable, "-c", script, *arguments]
    return subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout


class Hub(BaseHTTPRequestHandler):
    """As much of the hub's interface as reading takes, over the repositories in the server's `folders`."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: object) -> None:
        pass

    def do_GET(self) -> None:
        folders, asked = self.server.folders, self.server.asked  # type: ignore[attr-defined]
        path = self.path.split("?")[0].removeprefix("/api").removeprefix("/datasets/")
        name = "/".join(path.split("/")[:2])
        folder, path = folders.get(name), path.removeprefix(name)
        asked.append(path)
        code, body, headers = 404, b"", {"X-Error-Code": "RepoNotFound"}
        if folder is None:
            pass
        elif path == "" or path.startswith("/revision/"):
            files = [{"rfilename": p.relative_to(folder).as_posix()} for p in folder.rglob("*") if p.is_file()]
            info = {"id": name, "sha": REVISION, "private": False, "siblings": files}
            code, body, headers = 200, json.dumps(info).encode(), {"Content-Type": "application/json"}
        elif path.startswith("/tree/"):
            below = sorted(folder.joinpath(*path.split("/")[3:]).glob("*"))
            listing = [
                {"type": "file" if p.is_file() else "directory", "path": p.relative_to(folder).as_posix(),
                 "oid": "0" * 40, "size": 1}
                for p in below
            ]  # fmt: skip
            code, body, headers = 200 if below else 404, json.dumps(listing).encode(), {}
        elif path.startswith("/resolve/"):
            file = folder.joinpath(*path.split("/")[3:])
            headers = {"X-Repo-Commit": REVISION, "X-Error-Code": "EntryNotFound"}
            if file.is_file():
                code, body = 200, file.read_bytes()
                headers = {"X-Repo-Commit": REVISION, "ETag": f'"{hashlib.sha1(body).hexdigest()}"'}
        self.send_response(code)
        for key, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_HEAD = do_GET  # noqa: N815


@contextmanager
def serving(folders: Mapping[str, Path]) -> Iterator[ThreadingHTTPServer]:
    """A hub with data sets of these names; it notes in `asked` what was asked of them."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.folders, server.asked = folders, []  # type: ignore[attr-defined]
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


def cache_folder(home: Path, name: str) -> Path:
    """The folder of a snapshot in the layout in which the hub's client caches a data set."""
    repository = home / "hub" / f"datasets--{name.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(REVISION)
    folder = repository / "snapshots" / REVISION
    folder.mkdir(parents=True)
    return folder
