"""gRPC unary calls, HTTP/2 in and out: 64 octets in a message each way, trailers, 4 connections with 8 streams each."""

import tempfile
from pathlib import Path

from bench._figures import Round
from bench._http import PROXIES, first_line
from bench._load import h2load
from bench._question import Options, Question, Standing, measure
from bench._systems import PAYLOAD


def put(standing: Standing, options: Options) -> Round:
    system = standing.system
    with tempfile.NamedTemporaryFile(prefix="bench-message-") as message:
        # Not compressed, the length, the message itself.
        Path(message.name).write_bytes(b"\0\0\0\0" + bytes([PAYLOAD]) + b"x" * PAYLOAD)
        fields = ["-H", "content-type: application/grpc", "-H", "te: trailers", "-d", message.name, "-m8"]
        url = f"{system.url}/bench.Echo/Unary"
        return measure(system, lambda: h2load(system.client, url, options.seconds, *fields, clients=4))


QUESTION = Question(
    "grpc_unary", first_line(__doc__), ("grpc",),
    ("origin", "netproxy", "netproxy-reference", *PROXIES, "nghttpx"), put,
)  # fmt: skip
main = QUESTION.main
