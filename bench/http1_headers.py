"""HTTP/1.1 with 32 fields more in the request and 32 more in the answer, 64 octets of content."""

from bench._http import http1
from bench._systems import HEADERS

FIELDS = {f"x-request-{n:02}": f"value-{n:02}" for n in range(HEADERS)}

QUESTION = http1("http1_headers", __doc__, "/api/headers", headers=FIELDS, reference=True)
main = QUESTION.main
