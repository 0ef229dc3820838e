"""A web server for tests: a folder over http with ranges, and the faults of real ones on demand."""

import http.server
import random
import re
import threading
import time

from mae.data import download


class Server(http.server.ThreadingHTTPServer):
    """Serves a folder with ranges, and the faults that it is told: a list a path, taken one a request."""

    daemon_threads = True

    def __init__(self, root):
        super().__init__(("127.0.0.1", 0), Handler)
        self.root, self.faults, self.asked, self.ranges, self.tag = root, {}, [], True, '"1"'
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def handle_error(self, request, client_address):
        pass  # clients that hang up are part of the play


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):
        server, path = self.server, self.path.partition("?")[0]
        server.asked.append((self.path, dict(self.headers)))
        faults = server.faults.get(path, [])
        fault = faults.pop(0) if faults else ""
        file = server.root / path.lstrip("/")
        if fault.isdigit():
            return self.send_error(int(fault))
        if fault == "reset":
            return self.connection.close()
        if not file.is_file():
            return self.send_error(404)
        body, status = file.read_bytes(), 200
        total, start = len(body), 0
        wanted = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if wanted and server.ranges and self.headers.get("If-Range", server.tag) == server.tag:
            start, status = int(wanted[1]), 206
            if start >= total:
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{total}")
                self.send_header("Content-Length", "0")
                return self.end_headers()
        if fault == "other":
            start = max(start - 7, 0)
        body = body[start:]
        self.send_response(status)
        self.send_header("ETag", server.tag)
        if status == 206:
            self.send_header("Content-Range", f"bytes {start}-{total - 1}/{total}")
        claimed = {"long": len(body) + 100, "short": max(len(body) - 700, 0)}.get(fault, len(body))
        if fault != "mute":  # a body that ends with the connection
            self.send_header("Content-Length", str(claimed))
        self.send_header("Connection", "close")
        self.end_headers()
        cut = random.Random(len(server.asked)).randrange(1, max(len(body), 2)) if fault in ("drop", "mute", "stall") else len(body)
        self.wfile.write(body[:cut])
        if fault == "stall":
            self.wfile.flush()
            time.sleep(2.5 * download.SILENCE_SECONDS)
        self.close_connection = True


def serving(tmp_path, monkeypatch):
    """A fixture's generator: the server of tmp_path/there, little patience, a cache folder of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "*")
    for name, value in (("FIRST_WAIT", 0.001), ("LONGEST_WAIT", 0.01), ("SILENCE_SECONDS", 0.2)):
        monkeypatch.setattr(download, name, value)
    (tmp_path / "there").mkdir()
    server = Server(tmp_path / "there")
    yield server
    server.shutdown()
    server.server_close()
