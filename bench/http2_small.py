"""HTTP/2 in, HTTP/1.1 out: 64 octets of answer, 4 connections with 8 streams each. The origin alone answers HTTP/2."""

from bench._http import http2

QUESTION = http2("http2_small", __doc__, "/api/small", shape="h2")
main = QUESTION.main
