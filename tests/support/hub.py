"""A Hugging Face hub of one repository, on this machine, with the endpoints that a download needs."""

import hashlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

REPOSITORY = "org/name"


class Hub:
    """``files``: by name. ``revisions``: the commit of each branch, tag and commit. ``refusals``: status and error code of
    the answer to each request for a file (all files: ``*``), instead of the file. ``requests``: what was asked for."""

    def __init__(self, files: dict[str, bytes], commit: str) -> None:
        self.files = files
        self.revisions = {"main": commit, commit: commit}
        self.refusals: dict[str, tuple[int, str]] = {}
        self.requests: list[tuple[str, str]] = []

    def answer(self, path: str) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body for ``/org/name/resolve/<revision>/<file>``."""
        repository, _, rest = path.removeprefix("/").partition("/resolve/")
        revision, _, name = rest.partition("/")
        if repository != REPOSITORY:
            return 404, {"X-Error-Code": "RepoNotFound"}, b""
        refusal = self.refusals.get(name) or self.refusals.get("*")
        if refusal:
            return refusal[0], {"X-Error-Code": refusal[1]}, b""
        commit = self.revisions.get(revision)
        if commit is None:
            return 404, {"X-Error-Code": "RevisionNotFound"}, b""
        known = {"X-Repo-Commit": commit}
        if name not in self.files:
            return 404, known | {"X-Error-Code": "EntryNotFound"}, b""
        body = self.files[name]
        return 200, known | {"ETag": f'"{hashlib.sha256(body).hexdigest()}"'}, body


@contextmanager
def serving(hub: Hub) -> Iterator[str]:
    """Serves a hub; the value is its address."""

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            hub.requests.append((self.command, self.path.rpartition("/")[2]))
            status, headers, body = hub.answer(self.path)
            self.send_response(status)
            for header, value in headers.items():
                self.send_header(header, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def log_message(self, *given: object) -> None:
            del given

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()
