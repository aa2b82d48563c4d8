"""A web server of files with ranges and versions, which fails as it is told."""

import hashlib
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote


@dataclass(frozen=True)
class Fault:
    """What becomes of requests for bytes of a file: a status, or a connection that ends after so
    many bytes of the body. Of `times` requests; "" is every file."""

    status: int = 0
    cut_after: int | None = None
    times: int = 1
    file: str = ""


@dataclass
class Served:
    """What the server has, what went wrong where, and which bytes it was asked for."""

    files: dict[str, bytes] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)
    # Of requests for bytes: the file and the range that was asked for, in order.
    asked: list[tuple[str, int, int]] = field(default_factory=list)
    # Of all requests: their method.
    methods: list[str] = field(default_factory=list)
    # Whether it gives ranges, and whether it says that it gives none.
    ranges: bool = True
    tells: bool = False
    address: str = ""

    def put(self, name: str, data: bytes) -> str:
        """Serve a file; returns its address."""
        self.files[name] = data
        return f"{self.address}/{name}"

    def fault_of(self, name: str) -> Fault | None:
        """What becomes of the next request for a file."""
        for place, fault in enumerate(self.faults):
            if fault.file in ("", name):
                left = Fault(fault.status, fault.cut_after, fault.times - 1, fault.file)
                self.faults[place : place + 1] = [left] if left.times else []
                return fault
        return None


@contextmanager
def serving() -> Iterator[Served]:
    """The server, until the block ends."""
    served = Served()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self.answer()

        def do_GET(self) -> None:
            self.answer()

        def answer(self) -> None:
            served.methods.append(self.command)
            name = unquote(self.path).lstrip("/")
            if name not in served.files:
                self.tell_folder(name)
                return
            data, start = served.files[name], 0
            end = len(data)
            asked = re.match(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
            if asked and served.ranges:
                start, end = int(asked[1]), min(int(asked[2]) + 1, len(data))
            if self.command == "GET":
                served.asked.append((name, start, end))
            fault = served.fault_of(name)
            if fault and fault.status:
                self.say(fault.status)
                return
            if start and start >= len(data):
                self.say(416)
                return
            self.send_response(206 if asked and served.ranges else 200)
            self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()[:16]}"')
            self.send_header("Content-Length", str(end - start))
            if served.tells and not served.ranges:
                self.send_header("Accept-Ranges", "none")
            self.end_headers()
            if self.command == "GET":
                whole = data[start:end]
                self.wfile.write(whole[: fault.cut_after] if fault else whole)
                self.close_connection = fault is not None

        def tell_folder(self, name: str) -> None:
            under = f"{name.rstrip('/')}/" if name else ""
            inside = {x.removeprefix(under) for x in served.files if x.startswith(under)}
            links = {part + slash for part, slash, _ in (x.partition("/") for x in inside)}
            if not links:
                self.say(404)
                return
            page = f'<a href="?C=N;O=D">Name</a><a href="/{under}">.</a>' + "".join(
                f'<a href="/{under}{link}">{link}</a>' for link in sorted(links)
            )
            self.say(200, page.encode(), "text/html")

        def say(self, status: int, body: bytes = b"", kind: str = "text/plain") -> None:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        served.address = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        try:
            yield served
        finally:
            server.shutdown()
            thread.join()
