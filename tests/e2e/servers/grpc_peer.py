"""A gRPC server and a gRPC client of grpcio, with octets as messages: no generated code.

``grpc_peer.py serve PORT JOURNAL`` journals, one JSON object a line: ``call`` (method, seconds left, metadata) and
``over`` (a method whose call ended or was cancelled).
``grpc_peer.py call ADDRESS SCENARIO [ARGUMENT ...]`` does one scenario on one channel and prints JSON.
"""

import hashlib
import json
import os
import sys
import threading
import time
from concurrent import futures
from pathlib import Path

import grpc

LIMIT = 8 << 20
OPTIONS = [
    ("grpc.max_send_message_length", LIMIT),
    ("grpc.max_receive_message_length", LIMIT),
    ("grpc.enable_http_proxy", 0),
    ("grpc.so_reuseport", 0),
]
SERVICE = "/shop.Echo/"


# -- the server


class Echo(grpc.GenericRpcHandler):
    def __init__(self, journal):
        self.out = os.open(journal, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def journal(self, event, **fields):
        os.write(self.out, json.dumps({"event": event, **fields}, default=bytes.hex).encode() + b"\n")

    def service(self, details):
        name = details.method.removeprefix(SERVICE)
        kind = {
            "unary": grpc.unary_unary_rpc_method_handler,
            "large": grpc.unary_unary_rpc_method_handler,
            "fail": grpc.unary_unary_rpc_method_handler,
            "sleep": grpc.unary_unary_rpc_method_handler,
            "count": grpc.unary_stream_rpc_method_handler,
            "endless": grpc.unary_stream_rpc_method_handler,
            "fail_late": grpc.unary_stream_rpc_method_handler,
            "digest": grpc.stream_unary_rpc_method_handler,
            "chat": grpc.stream_stream_rpc_method_handler,
        }.get(name)
        if kind is None or not details.method.startswith(SERVICE):
            return None
        return kind(getattr(self, name))

    def enter(self, name, context):
        self.journal("call", method=name, left=context.time_remaining(), metadata=dict(context.invocation_metadata()))
        context.add_callback(lambda: self.journal("over", method=name))

    def unary(self, request, context):
        self.enter("unary", context)
        context.send_initial_metadata((("first", "1"), ("first-bin", b"\x00\xff")))
        context.set_trailing_metadata((("last", "2"), ("last-bin", b"\xff\x00")))
        return request[::-1]

    def large(self, request, context):
        self.enter("large", context)
        return request

    def fail(self, request, context):
        self.enter("fail", context)
        context.set_trailing_metadata((("why", "test"),))
        context.abort(grpc.StatusCode.DATA_LOSS, "lost: 100% – ü\n")

    def sleep(self, request, context):
        self.enter("sleep", context)
        gone = threading.Event()
        context.add_callback(gone.set)
        gone.wait(60)
        return b""

    def count(self, request, context):
        self.enter("count", context)
        for number in range(int(request)):
            yield b"%d" % number

    def endless(self, request, context):
        self.enter("endless", context)
        while context.is_active():
            yield request
            if not request:
                time.sleep(0.01)

    def fail_late(self, request, context):
        self.enter("fail_late", context)
        yield b"one"
        context.abort(grpc.StatusCode.ABORTED, "after one")

    def digest(self, requests, context):
        self.enter("digest", context)
        sha, size = hashlib.sha256(), 0
        for message in requests:
            sha.update(message)
            size += len(message)
        return json.dumps([size, sha.hexdigest()]).encode()

    def chat(self, requests, context):
        self.enter("chat", context)
        for message in requests:
            yield message.upper()


def serve(port, journal):
    server = grpc.server(futures.ThreadPoolExecutor(40), handlers=[Echo(journal)], options=OPTIONS)
    server.add_insecure_port(f"0.0.0.0:{port}")
    server.start()
    server.wait_for_termination()


# -- the client


class Client:
    def __init__(self, address):
        self.channel = grpc.insecure_channel(address, options=[*OPTIONS, ("grpc.max_reconnect_backoff_ms", 200)])

    def failed(self, exc):
        metadata = [*(exc.initial_metadata() or ()), *(exc.trailing_metadata() or ())]
        flag = next((value for name, value in metadata if name == "x-netproxy-reason"), "")
        why = next((value for name, value in metadata if name == "why"), "")
        return {"code": exc.code().name, "details": exc.details(), "flag": flag, "why": why}

    def method(self, kind, name):
        return getattr(self.channel, kind)(SERVICE + name)

    def unary(self, text="abc", timeout="20"):
        try:
            answer, call = self.method("unary_unary", "unary").with_call(
                text.encode(), timeout=float(timeout), metadata=(("x-one", "1"), ("x-two-bin", b"\x00\x01"))
            )
        except grpc.RpcError as exc:
            return self.failed(exc)
        first, last = dict(call.initial_metadata()), dict(call.trailing_metadata())
        return {
            "code": call.code().name,
            "answer": answer.decode(),
            "first": [first.get("first"), first.get("first-bin", b"").hex()],
            "last": [last.get("last"), last.get("last-bin", b"").hex()],
        }

    def named(self, name, timeout="20"):
        try:
            self.method("unary_unary", name)(b"", timeout=float(timeout) or None)
        except grpc.RpcError as exc:
            return self.failed(exc)
        return {"code": "OK"}

    def large(self):
        sent = os.urandom(1 << 20) * 4
        return {"same": self.method("unary_unary", "large")(sent, timeout=60) == sent}

    def count(self, number):
        got = [int(message) for message in self.method("unary_stream", "count")(number.encode(), timeout=60)]
        return {"in_order": got == list(range(int(number)))}

    def fail_late(self):
        got = []
        try:
            got.extend(message.decode() for message in self.method("unary_stream", "fail_late")(b"", timeout=20))
        except grpc.RpcError as exc:
            return {"got": got, **self.failed(exc)}
        return {"got": got, "code": "OK"}

    def digest(self, messages, size):
        block = os.urandom(int(size))
        sha = hashlib.sha256()
        for _ in range(int(messages)):
            sha.update(block)
        total = int(messages) * len(block)
        answer = self.method("stream_unary", "digest")((block for _ in range(int(messages))), timeout=60)
        return {"same": json.loads(answer) == [total, sha.hexdigest()]}

    def chat(self, rounds):
        """Each message is an answer to the one before."""
        turn, said = threading.Semaphore(1), []

        def messages():
            for number in range(int(rounds)):
                turn.acquire()
                yield b"message %d" % number

        for message in self.method("stream_stream", "chat")(messages(), timeout=60):
            said.append(message.decode())
            turn.release()
        return {"said": said}

    def many(self, calls):
        method = self.method("unary_unary", "unary")
        sent = [b"call %d" % number for number in range(int(calls))]
        pending = [method.future(message, timeout=60) for message in sent]
        return {"right": sum(call.result() == message[::-1] for call, message in zip(pending, sent, strict=True))}

    def cancel(self, journal):
        """The channel stays until the server has seen it."""
        journal = Path(journal)
        over = json.dumps({"event": "over", "method": "endless"})
        before = journal.read_text().count(over) if journal.exists() else 0
        stream = self.method("unary_stream", "endless")(b"x" * 1000, timeout=60)
        got = sum(1 for _, message in zip(range(5), stream, strict=False))
        stream.cancel()
        try:
            for _ in stream:
                pass
        except grpc.RpcError as exc:
            code = exc.code().name
            end = time.monotonic() + 20
            while journal.read_text().count(over) == before and time.monotonic() < end:
                time.sleep(0.02)
            return {"got": got, "code": code, "seen": journal.read_text().count(over) > before}
        return {"got": got}

    def deadline(self, timeout):
        """Of a stream that has begun."""
        got = 0
        try:
            for _ in self.method("unary_stream", "endless")(b"", timeout=float(timeout)):
                got += 1
        except grpc.RpcError as exc:
            return {"got": got > 0, **self.failed(exc)}
        return {"got": got > 0}

    def hold(self, mark, until):
        """A chat that says one thing, makes the file `mark`, and goes on when `until` is there. Then a call."""
        first = threading.Event()

        def messages():
            yield b"one"
            first.wait(30)
            open(mark, "w").close()
            wait_for_file(until)
            yield b"two"

        said, failure = [], {}
        try:
            for message in self.method("stream_stream", "chat")(messages(), timeout=90):
                said.append(message.decode())
                first.set()
        except grpc.RpcError as exc:
            failure = self.failed(exc)
        wait_for_file(until)
        try:
            after = self.method("unary_unary", "unary")(b"abc", timeout=30, wait_for_ready=True).decode()
        except grpc.RpcError as exc:
            after = self.failed(exc)
        return {"said": said, "after": after, **failure}


def wait_for_file(path):
    end = time.monotonic() + 60
    while not os.path.exists(path) and time.monotonic() < end:
        time.sleep(0.02)


def main():
    if sys.argv[1] == "serve":
        serve(sys.argv[2], sys.argv[3])
    else:
        client = Client(sys.argv[2])
        print(json.dumps(getattr(client, sys.argv[3])(*sys.argv[4:])))


main()
