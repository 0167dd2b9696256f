"""A Hugging Face hub in this process that answers every question about a model in one way."""

import socket
import struct
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Hub(ThreadingHTTPServer):
    """Answers with a status, or as a "gated" model, a "page" of a proxy; "reset" or "hang": not at all."""

    daemon_threads = True

    def __init__(self, fault: object) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.fault, self.asked, self.closed = fault, [], threading.Event()
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request, address) -> None:
        """Prints nothing."""

    def __exit__(self, *_) -> None:
        self.closed.set()
        self.shutdown()
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        fault = self.server.fault
        self.server.asked.append(self.path)
        if fault == "hang":
            self.server.closed.wait(60)
        elif fault == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
        else:
            status = {"page": 200, "gated": 403}.get(fault, fault)
            content = b"<html>log in</html>" if fault == "page" else b"{}"
            self.send_response(status)
            if fault == "gated":
                self.send_header("X-Error-Code", "GatedRepo")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

    def log_message(self, *arguments) -> None:
        """Prints nothing."""
