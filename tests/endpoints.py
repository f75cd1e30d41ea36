# SPDX-License-Identifier: Apache-2.0

"""A server between a client and an endpoint: it records requests, fails as told, and alters answers."""

import json
import threading
import urllib.error
import urllib.request
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Relay(BaseHTTPRequestHandler):
    """Forwards requests to `server.target`. `server.failures` come first, each a status with a body, or "hang up"."""

    def do_GET(self):
        self.relay(None)

    def do_POST(self):
        self.relay(self.rfile.read(int(self.headers["Content-Length"])))

    def relay(self, body):
        server = self.server
        with server.lock:
            server.active += 1
        try:
            self.hand_on(body)
        finally:
            with server.lock:
                server.active -= 1

    def hand_on(self, body):
        server = self.server
        with server.lock:
            server.requests.append((self.path, dict(self.headers), body and json.loads(body)))
            failure = server.failures.pop(0) if server.failures and body else None
        if server.hold is not None and body:
            server.hold(len(server.requests))
        if failure == "hang up":
            return
        if failure is not None:
            return self.answer(*failure)
        headers = {name: self.headers[name] for name in ("Authorization", "Content-Type") if self.headers[name]}
        try:
            with urllib.request.urlopen(urllib.request.Request(server.target + self.path, body, headers)) as response:
                status, answer = response.status, response.read()
        except urllib.error.HTTPError as error:
            status, answer = error.code, error.read()
        if status == 200 and server.alter is not None and body:
            answer = server.alter(answer)
        self.answer(status, answer)

    def answer(self, status, body, **headers):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


class Relays(ThreadingHTTPServer):
    request_queue_size = 128

    def handle_error(self, *_):
        pass  # the client was killed


@contextmanager
def relaying(target):
    """A relay to the target. Its `url` ends in `/v1`."""
    with Relays(("127.0.0.1", 0), Relay) as server:
        server.target, server.url = target, f"http://127.0.0.1:{server.server_port}/v1"
        server.requests, server.failures, server.lock = [], [], threading.Lock()
        server.alter, server.hold, server.active = None, None, 0
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()
