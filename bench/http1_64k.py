"""HTTP/1.1 with 64 KiB of content in the answer, 32 connections that are kept."""

from bench._http import http1

QUESTION = http1("http1_64k", __doc__, "/api/64k", reference=True)
main = QUESTION.main
