"""A Hugging Face hub on the loopback, as far as huggingface_hub asks it: who one is, repositories, commits of small files, downloads."""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """Attributes:
    token: what it lets in. repositories: the files of each by its name, "dataset" repositories as datasets/NAME.
    made: what was said when each was made. refuses: the answer to every commit, instead of taking it.
    """

    def __init__(self, token: str) -> None:
        self.token = token
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.made: dict[str, dict[str, Any]] = {}
        self.refuses: str | None = None

    def add_folder(self, name: str, folder: Path) -> None:
        files = [path for path in folder.rglob("*") if path.is_file()]
        self.repositories[name] = {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def _digest(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


def handler_of(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *arguments: object) -> None:
            pass

        def answer(self, status: int, content: Any = b"", **headers: str) -> None:
            body = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def do_POST(self) -> None:
            content = self.rfile.read(int(self.headers["Content-Length"]))
            if self.headers.get("Authorization") != f"Bearer {hub.token}":
                return self.answer(401, {"error": "Invalid username or password."})
            if self.path == "/api/repos/create":
                asked = json.loads(content)
                name = asked["name"] if "/" in asked["name"] else f"{asked['organization']}/{asked['name']}"
                known = name in hub.repositories
                hub.repositories.setdefault(name, {})
                hub.made.setdefault(name, asked)
                return self.answer(409 if known else 200, {"url": f"{huggingface_hub.constants.ENDPOINT}/{name}"})
            name, action = re.fullmatch(
                r"/api/(?:models|datasets)/([^/]+/[^/]+)/(preupload|commit)/main", self.path.partition("?")[0]
            ).groups()
            if action == "preupload":
                files = [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in json.loads(content)["files"]]
                return self.answer(200, {"files": files})
            if hub.refuses is not None:
                return self.answer(403, {"error": hub.refuses}, X_Error_Message=hub.refuses)
            for line in map(json.loads, content.splitlines()):
                if line["key"] == "file":
                    hub.repositories[name][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            self.answer(
                200, {"success": True, "commitOid": COMMIT, "commitUrl": f"{huggingface_hub.constants.ENDPOINT}/{name}/commit/{COMMIT}"}
            )

        def do_GET(self) -> None:
            if self.path == "/api/whoami-v2":
                known = self.headers.get("Authorization") == f"Bearer {hub.token}"
                return self.answer(200, {"name": "owner"}) if known else self.answer(401, {"error": "Invalid username or password."})
            if match := re.fullmatch(r"/api/(?:models|datasets)/([^/]+/[^/?]+)(?:/revision/[^?]+)?(?:\?.*)?", self.path):
                files = hub.repositories.get(match[1])
                if files is not None:
                    found = {"id": match[1], "sha": COMMIT, "siblings": [{"rfilename": file} for file in files]}
                    return self.answer(200, found)
            elif (match := re.fullmatch(r"/api/(?:models|datasets)/([^/]+/[^/]+)/tree/.*", self.path)) and match[1] in hub.repositories:
                entries = hub.repositories[match[1]].items()
                return self.answer(200, [{"type": "file", "path": file, "size": len(own), "oid": _digest(own)} for file, own in entries])
            elif match := re.fullmatch(r"/(?:datasets/)?([^/]+/[^/]+)/resolve/[^/]+/(.+)", self.path):
                content = hub.repositories.get(match[1], {}).get(match[2])
                if content is not None:
                    return self.answer(200, content, ETag=f'"{_digest(content)}"', X_Repo_Commit=COMMIT)
            self.answer(404, {"error": "not found"}, X_Error_Code="RepoNotFound")

        do_HEAD = do_GET

    return Handler


@contextmanager
def hub_on_loopback(cache: Path, patch: pytest.MonkeyPatch, token: str = "hf_secret") -> Iterator[Hub]:
    """A hub that huggingface_hub talks to during the block, with its cache in this folder."""
    hub = Hub(token)
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler_of(hub))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    constants = huggingface_hub.constants
    patch.setattr(constants, "ENDPOINT", endpoint := f"http://127.0.0.1:{server.server_port}")
    patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}")
    patch.setattr(constants, "HF_HUB_CACHE", str(cache))
    patch.setattr(constants, "HF_HUB_OFFLINE", False)
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
