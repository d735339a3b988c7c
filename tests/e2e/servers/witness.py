"""An HTTP/1.1 server that tells how a request came to it, and can hold an answer back.

Usage: ``witness.py PORT JOURNAL``. One line per request goes to JOURNAL, before the answer: the path. A path
``/hold/NAME`` is answered in two halves: the second comes when the file NAME exists beside the journal. Any answer is
JSON: ``peer`` (address and port that the connection came from) and ``meshed`` (a proxy vouches for the client).
"""

import json
import os
import socketserver
import sys
import time
from http.server import BaseHTTPRequestHandler

PORT, JOURNAL = int(sys.argv[1]), sys.argv[2]
FOLDER = os.path.dirname(JOURNAL)
HOLD_S = 30.0
journal = os.open(JOURNAL, os.O_WRONLY | os.O_APPEND | os.O_CREAT)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_GET(self):
        os.write(journal, f"{self.path}\n".encode())
        told = {"peer": list(self.client_address[:2]), "meshed": "x-forwarded-client-cert" in self.headers}
        body = json.dumps(told).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        if self.path.startswith("/hold/"):
            self.wfile.write(body[:5])
            until = time.monotonic() + HOLD_S
            while not os.path.exists(os.path.join(FOLDER, self.path[6:])) and time.monotonic() < until:
                time.sleep(0.01)
            body = body[5:]
        self.wfile.write(body)

    def log_message(self, *_):
        pass

    def handle(self):
        try:
            super().handle()
        except OSError:
            pass  # the client went


class Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = 512


Server(("0.0.0.0", PORT), Handler).serve_forever()
