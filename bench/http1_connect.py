"""HTTP/1.1 with a connection per request: 64 octets of answer, 32 clients."""

from bench._http import http1

QUESTION = http1("http1_connect", __doc__, "/api/small", headers={"connection": "close"})
main = QUESTION.main
