"""HTTP/1.1, small: 64 octets of answer, 32 connections that are kept."""

from bench._http import http1

QUESTION = http1("http1_small", __doc__, "/api/small", reference=True)
main = QUESTION.main
