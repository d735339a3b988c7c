# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""The HTTP/1 engines that are used: the rules of `strict` and the cycles of `h1_reference`, compiled, in one pass.

What may be read, where a message ends, what is refused and with which words is told by `strict`, and the tests hold
the two against each other; how an exchange goes on is told by `h1_reference`. Octets are looked at once: the start line
and each field when its line is complete, content only where it is framed by chunks. Fields that frame or that decide
about the connection are noticed by name while the line is read; no other field is looked at.

Where nothing is held back, heads and content are read in the very bytes object that was received, and a read that is
content as a whole is handed on without a copy.
"""

from cpython.bytearray cimport PyByteArray_AS_STRING, PyByteArray_GET_SIZE
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.object cimport PyObject
from cpython.ref cimport Py_INCREF, Py_XDECREF
from libc.string cimport memchr, memcmp, memcpy

from netproxy.codec.engine cimport H1Engine
from netproxy.codec.events cimport Data, End, Informational, RequestHead, ResponseHead, Trailers
from netproxy.codec.events cimport content, request_head, response_head
from netproxy.codec.fields cimport is_like_xfcc

from netproxy.codec.events import ConnectionClosed
from netproxy.codec.fields import BITS, NAMING, XFCC, XFCC_LIKE
from netproxy.codec.h1_reference import REASON_PHRASES
from netproxy.codec.strict import (
    FORBIDDEN_TRAILERS,
    MAX_CHUNK_LINE,
    MAX_CHUNK_OVERHEAD,
    MAX_LEADING_LINES,
    H1Limits,
    Rule,
    check_authority,
    check_chunk_line,
    check_target,
    connection_options,
    field_rule,
    is_token,
)
from netproxy.errors import LocalProtocolError, RemoteProtocolError

# What is read next. As `strict.State`.
cdef enum:
    WAIT
    HEAD
    LENGTH
    UNTIL_CLOSE
    CHUNK_LINE
    CHUNK_DATA
    CHUNK_END
    TRAILER
    DISCARD

# What was sent of our message.
cdef enum:
    OUT_NONE
    OUT_BODY
    OUT_DONE

# Fields that are noticed.
cdef enum:
    T_NONE
    T_HOST
    T_LENGTH
    T_CODING
    T_CONNECTION
    T_UPGRADE

# What Connection fields say, all of them together.
cdef enum:
    O_CLOSE = 1
    O_KEEP_ALIVE = 2
    O_UPGRADE = 4
    O_FRAMES = 8
    O_NO_TOKEN = 16
    O_OTHER = 32

# Content that is sent, beside octets by length.
cdef enum:
    OUT_CHUNKED = -1
    OUT_UNTIL_CLOSE = -2

cdef long long _MAX_LENGTH = 0x7FFFFFFFFFFFFFFF
cdef long long _MAX_OVERHEAD = MAX_CHUNK_OVERHEAD
cdef Py_ssize_t _CHUNK_LINE_LIMIT = MAX_CHUNK_LINE
cdef int _LEADING_LIMIT = MAX_LEADING_LINES

# --- octets

cdef unsigned char _TCHAR[256]
cdef unsigned char _VALUE[256]
cdef unsigned char _LOWER[256]
cdef unsigned char _REG_NAME[256]
cdef signed char _HEX[256]


def _fill():
    cdef int octet
    for octet in range(256):
        _TCHAR[octet] = octet < 128 and (chr(octet).isalnum() or chr(octet) in "!#$%&'*+-.^_`|~")
        _VALUE[octet] = octet == 9 or (octet >= 32 and octet != 127)
        _LOWER[octet] = octet + 32 if 65 <= octet <= 90 else octet
        _REG_NAME[octet] = octet < 128 and (chr(octet).isalnum() or chr(octet) in "-._~!$&'()*+,;=")
        _HEX[octet] = int(chr(octet), 16) if octet < 128 and chr(octet) in "0123456789abcdefABCDEF" else -1


_fill()

cdef inline bint _is_value(const unsigned char *p, Py_ssize_t n) noexcept:
    """Of octets that a value may have. Eight at once, as long as there is none that has to be looked at by itself."""
    cdef unsigned long long word
    cdef Py_ssize_t i = 0
    while i + 8 <= n:
        memcpy(&word, p + i, 8)
        # Some octet is below 32, or 127 (with bit 7 set they are neither).
        if ((word - 0x2020202020202020ull) & ~word | ((word ^ 0x7F7F7F7F7F7F7F7Full) - 0x0101010101010101ull) & ~(
            word ^ 0x7F7F7F7F7F7F7F7Full
        )) & 0x8080808080808080ull:
            break
        i += 8
    while i < n and _VALUE[p[i]]:
        i += 1
    return i == n


# --- names of fields: one object each for those that everybody sends

cdef struct Known:
    const unsigned char *text
    Py_ssize_t size
    PyObject *name
    int tag
    long bits  # of `fields`
    bint repeats

cdef Known _known[256]
cdef list _kept = []


cdef inline unsigned int _slot(unsigned char first, unsigned char last, Py_ssize_t size) noexcept:
    return (first * 7 + last * 31 + <unsigned int>size * 13) & 255


def _remember():
    tags = {
        b"host": T_HOST, b"content-length": T_LENGTH, b"transfer-encoding": T_CODING,
        b"connection": T_CONNECTION, b"upgrade": T_UPGRADE,
    }
    # Lines of these are often the same, and hold nothing that is a secret of whoever sends them.
    repeating = b"""
    accept accept-encoding accept-language accept-ranges cache-control connection content-encoding content-length
    content-type date host keep-alive pragma server te transfer-encoding upgrade user-agent vary x-forwarded-proto
    """.split()
    names = [*tags, *b"""
    accept accept-encoding accept-language accept-ranges access-control-allow-origin age authorization cache-control
    content-encoding content-type cookie date etag expect expires forwarded from if-match if-modified-since if-none-match
    keep-alive last-modified link location origin pragma range referer retry-after server set-cookie te trailer traceparent
    tracestate user-agent vary via x-forwarded-client-cert x-forwarded-for x-forwarded-host x-forwarded-proto
    x-netproxy-reason x-request-id grpc-status grpc-message grpc-timeout content-range
    """.split()]
    names += [name for name in (*BITS, *repeating) if name not in names]
    cdef bytes name
    cdef unsigned int at
    for name in names:
        at = _slot(name[0], name[len(name) - 1], len(name))
        while _known[at].size:
            at = (at + 1) & 255
        _kept.append(name)
        _known[at].text = <const unsigned char *>PyBytes_AS_STRING(name)
        _known[at].size = len(name)
        _known[at].name = <PyObject *>name
        _known[at].tag = tags.get(name, T_NONE)
        _known[at].bits = BITS.get(name, 0)
        _known[at].repeats = name in repeating


_remember()


cdef bytes _lower_name(const unsigned char *p, Py_ssize_t n, Known **found):
    """The name in lower case: the object kept for it, or a new one. `found`: NULL if it is not kept."""
    cdef unsigned int at = _slot(_LOWER[p[0]], _LOWER[p[n - 1]], n)
    cdef Py_ssize_t i
    cdef Known *known
    while True:
        known = &_known[at]
        if known.size == 0:
            break
        if known.size == n:
            i = 0
            while i < n and _LOWER[p[i]] == known.text[i]:
                i += 1
            if i == n:
                found[0] = known
                return <bytes>known.name
        at = (at + 1) & 255
    found[0] = NULL
    cdef bytes name = PyBytes_FromStringAndSize(NULL, n)
    cdef unsigned char *out = <unsigned char *>PyBytes_AS_STRING(name)
    for i in range(n):
        out[i] = _LOWER[p[i]]
    return name


# --- lines of fields: those that came lately, each with the field that it is

cdef enum:
    LINES = 256
    LINE_SIZE = 96

cdef struct Line:
    unsigned char text[LINE_SIZE]
    Py_ssize_t size  # 0: none is kept here
    PyObject *field
    int tag
    int options
    long bits

cdef Line _lines_kept[LINES]


cdef inline Line *_line(const unsigned char *p, Py_ssize_t n) noexcept:
    """Where a line of 8 to LINE_SIZE octets would be kept."""
    cdef unsigned long long a, b
    memcpy(&a, p, 8)
    memcpy(&b, p + n - 8, 8)
    a = (a * 0x9E3779B97F4A7C15ull) ^ (b * 0xC2B2AE3D27D4EB4Full) ^ <unsigned long long>n
    a *= 0x9E3779B97F4A7C15ull
    return &_lines_kept[a >> 56]


cdef void _keep_line(Line *line, const unsigned char *p, Py_ssize_t n, tuple field, int tag, int options, long bits):
    Py_XDECREF(line.field)
    Py_INCREF(field)
    memcpy(line.text, p, n)
    line.size, line.field, line.tag, line.options, line.bits = n, <PyObject *>field, tag, options, bits


cdef long _NAMING = NAMING
cdef long _XFCC_LIKE = XFCC_LIKE
cdef Py_ssize_t _XFCC_SIZE = len(XFCC)

cdef dict _METHODS = {m: m for m in (b"GET", b"HEAD", b"POST", b"PUT", b"DELETE", b"OPTIONS", b"PATCH", b"CONNECT", b"TRACE")}
cdef bytes _GET = b"GET"
cdef bytes _POST = b"POST"
cdef bytes _HEAD = b"HEAD"
cdef bytes _CONNECT = b"CONNECT"
cdef bytes _V11 = b"1.1"
cdef bytes _V10 = b"1.0"
cdef bytes _CHUNKED = b"chunked"
cdef bytes _EMPTY = b""
cdef bytes _N_LENGTH = b"content-length"
cdef bytes _N_CODING = b"transfer-encoding"
cdef bytes _N_CONNECTION = b"connection"
cdef bytes _N_UPGRADE = b"upgrade"

# --- events

cdef End _end = End(1)
cdef object _connection_closed = ConnectionClosed()

# --- one connection


cdef class _Connection(H1Engine):
    """What both sides share: reading, and what is left of the connection."""

    cdef bint _server
    cdef bint _keep_spelling
    cdef bint _must_close
    cdef bint _draining
    cdef bint _dead
    cdef bint _eof
    cdef bint _closed
    cdef bint _tunnel
    cdef bint _their_tunnel_ended
    cdef bint _our_tunnel_ended
    cdef object _error
    cdef Py_ssize_t _max_head
    cdef Py_ssize_t _max_headers
    cdef Py_ssize_t _max_trailer
    cdef Py_ssize_t _max_pipelined
    # Reading. What could not be read yet waits in `_buf`; in its first `_scan` octets there is no LF.
    cdef bytearray _buf
    cdef Py_ssize_t _scan
    cdef int _state
    cdef long long _left
    cdef long long _overhead
    cdef bint _cr_seen
    cdef Py_ssize_t _section
    cdef Py_ssize_t _trailer_count
    cdef list _trailers
    # The head that is being read. `_head_size`: its octets that were read already.
    cdef Py_ssize_t _head_size
    cdef int _leading
    cdef bint _started
    cdef bytes _version
    cdef bytes _method
    cdef bytes _target
    cdef int _status
    cdef list _fields
    cdef dict _spelling
    cdef int _hosts
    cdef bytes _host
    cdef int _lengths
    cdef bytes _length
    cdef int _codings
    cdef Py_ssize_t _coding_at
    cdef int _options  # of all Connection fields
    cdef bint _has_upgrade
    cdef long _bits
    # Their message is whole.
    cdef bint _theirs_done
    # Of a server, the request being answered; of a client, the one that was sent.
    cdef bint _has_request
    cdef bytes _request_method
    cdef bytes _request_version
    cdef bint _request_tunnel
    # Sending.
    cdef int _out
    cdef long long _out_left
    cdef bint _out_bodiless
    cdef list _out_trailers

    def __init__(self, limits=None):
        limits = limits or H1Limits()
        self._max_head = limits.max_head_bytes
        self._max_headers = limits.max_headers
        self._max_trailer = limits.max_trailer_bytes
        self._max_pipelined = limits.max_pipelined_bytes
        self._buf = bytearray()
        self._request_version = _EMPTY
        self._request_method = _EMPTY
        self._state = WAIT
        self._start_head()
        if self._server:
            self._state = HEAD

    def __repr__(self):
        return (
            f"<{type(self).__name__} state={self._state} out={self._out} buffered={self.buffered} "
            f"must_close={self._must_close} eof={self._eof} error={self._error!r} dead={self._dead}>"
        )

    @property
    def must_close(self):
        return self._must_close

    @property
    def buffered(self):
        return self._buffered()

    cpdef bint is_last(self) except -1:
        return self._must_close

    cpdef Py_ssize_t held(self) except -1:
        return self._buffered()

    cpdef keep_spelling(self, bint on):
        if on != self._keep_spelling:
            self._keep_spelling = on
            self._spelling = {} if on else None

    cdef object _spelled(self):
        return self._spelling

    cdef Py_ssize_t _buffered(self):
        return PyByteArray_GET_SIZE(self._buf) + (self._head_size if self._state == HEAD else 0)

    cdef bint _is_idle(self):
        return (
            self._out == OUT_NONE and not self._has_request and not self._theirs_done and not self._dead
            and self._error is None and not self._eof and not self._must_close and not self._tunnel
        )

    # -- in -----------------------------------------------------------------------------------------

    cpdef list receive(self, bytes data):
        if self._dead:
            return []
        if PyBytes_GET_SIZE(data) == 0:
            self._eof = True
        elif self._eof:
            self._fail(RemoteProtocolError("octets after the end of the stream"))
        elif self._tunnel:
            return [content(1, data)]
        elif not self._server and (self._state == WAIT or self._state == DISCARD) and self._error is None:
            self._fail(RemoteProtocolError(Rule.UNSOLICITED.detail, 502))
        return self._read(data)

    cdef list _read(self, bytes data):
        cdef list events = []
        cdef Py_ssize_t at = 0
        cdef Py_ssize_t size
        cdef bytearray buf = self._buf  # what is read in it may drop it
        if self._dead:
            return events
        if self._error is not None:
            raise RemoteProtocolError(self._error.detail, self._error.status)
        if self._tunnel:
            self._buf += data
            return self._read_tunnel(events)
        if self._state != DISCARD:
            try:
                if PyByteArray_GET_SIZE(buf) == 0:
                    size = PyBytes_GET_SIZE(data)
                    self._parse(<const unsigned char *>PyBytes_AS_STRING(data), size, &at, events, data)
                    if at < size and self._state != DISCARD:
                        self._buf += data[at:]
                else:
                    buf += data
                    size = PyByteArray_GET_SIZE(buf)
                    self._parse(<const unsigned char *>PyByteArray_AS_STRING(buf), size, &at, events, None)
                    if at and self._state != DISCARD:
                        del buf[:at]
            except RemoteProtocolError as exc:
                self._fail(exc)
        if self._tunnel:
            return self._read_tunnel(events)
        if self._eof and not self._closed and not (self._state == WAIT and PyByteArray_GET_SIZE(self._buf)):
            self._at_eof(events)
        return events

    cdef int _at_eof(self, list events) except -1:
        cdef bint begun
        self._closed = self._must_close = True
        if self._state == UNTIL_CLOSE:
            self._state = WAIT
            self._end_of_theirs(events, 0)
            return 0
        if self._state != WAIT and self._state != DISCARD:
            begun = PyByteArray_GET_SIZE(self._buf) or self._started or not self._server
            if self._state != HEAD or begun:
                self._fail(self._refusal(Rule.EOF))
        events.append(_connection_closed)
        return 0

    cdef object _refusal(self, rule):
        return RemoteProtocolError(rule.detail, rule.status if self._server else 502)

    cdef int _refuse(self, rule) except -1:
        raise self._refusal(rule)

    cdef int _fail(self, error) except -1:
        # Not what is raised: its traceback leads to whoever holds the engine, a ring that only a full collection ends.
        self._error = RemoteProtocolError(error.detail, error.status)
        self._must_close = True
        self._discard()
        raise error

    cdef void _discard(self):
        """Nothing more is to be read from this peer (RFC 9112 9.6)."""
        self._state = DISCARD
        self._head_size = self._scan = 0
        self._buf = bytearray()

    cdef int _parse(self, const unsigned char *p, Py_ssize_t n, Py_ssize_t *at, list events, bytes whole) except -1:
        """As far as there are octets and the state says what they are."""
        cdef list chunks = []
        while True:
            if self._state == HEAD:
                if not self._read_head(p, n, at, events):
                    break
            elif self._state == WAIT or self._state == DISCARD:
                break
            elif at[0] == n:
                break
            elif not self._read_content(p, n, at, events, chunks, whole):
                break
            if self._tunnel:
                break
        self._flush(events, chunks)
        return 0

    cdef void _start_head(self):
        self._scan = 0
        self._head_size = 0
        self._leading = 0
        self._started = False
        self._fields = []
        self._spelling = {} if self._keep_spelling else None
        self._hosts = self._lengths = self._codings = 0
        self._has_upgrade = False
        self._options = 0
        self._bits = 0

    cdef int _read_head(self, const unsigned char *p, Py_ssize_t n, Py_ssize_t *place, list events) except -1:
        """1: a head is complete. 0: more octets are needed."""
        cdef Py_ssize_t at = place[0]
        cdef Py_ssize_t line_end
        cdef Py_ssize_t size
        cdef const unsigned char *found
        while True:
            # Before the search for a line end: a TLS record or other noise may never have one.
            if not self._started and at < n:
                if self._server:
                    if not (_TCHAR[p[at]] or p[at] == 13 or p[at] == 10):
                        self._refuse(Rule.START)
                elif p[at] != 72:
                    self._refuse(Rule.START)
            found = NULL
            if n - at > self._scan:
                found = <const unsigned char *>memchr(p + at + self._scan, 10, n - at - self._scan)
            if found == NULL:
                self._scan = n - at
                if self._head_size + n - at > self._max_head:
                    self._refuse(Rule.HEAD_SIZE)
                place[0] = at
                return 0
            line_end = found - p
            if self._head_size + line_end - at >= self._max_head:
                self._refuse(Rule.HEAD_SIZE)
            if line_end == at or p[line_end - 1] != 13:
                self._refuse(Rule.BARE_LF)
            size = line_end - 1 - at
            self._scan = 0
            if not self._started:
                if size:
                    if self._server:
                        self._read_request_line(p + at, size)
                    else:
                        self._read_status_line(p + at, size)
                    self._started = True
                    self._head_size += line_end + 1 - at
                else:
                    self._leading += 1
                    if not self._server or self._leading > _LEADING_LIMIT:
                        self._refuse(Rule.LEADING_LINES)
                at = line_end + 1
            elif size:
                self._read_field(p + at, size)
                if len(self._fields) > self._max_headers:
                    self._refuse(Rule.FIELD_COUNT)
                self._head_size += line_end + 1 - at
                at = line_end + 1
            else:
                place[0] = line_end + 1
                self._finish_head(events, n - line_end - 1)
                return 1

    cdef int _read_request_line(self, const unsigned char *p, Py_ssize_t n) except -1:
        cdef Py_ssize_t i = 0
        cdef Py_ssize_t start
        cdef bint sharp = False
        while i < n and _TCHAR[p[i]]:
            i += 1
        if i == 0 or i == n or p[i] != 32:
            return self._refuse(Rule.REQUEST_LINE)
        if i == 3 and memcmp(p, b"GET", 3) == 0:
            self._method = _GET
        elif i == 4 and memcmp(p, b"POST", 4) == 0:
            self._method = _POST
        else:
            self._method = PyBytes_FromStringAndSize(<const char *>p, i)
            self._method = _METHODS.get(self._method, self._method)
        i += 1
        start = i
        while i < n and 0x21 <= p[i] <= 0x7E:
            if p[i] == 35:
                sharp = True
            i += 1
        if i == start or n - i != 9 or memcmp(p + i, b" HTTP/", 6) != 0:
            return self._refuse(Rule.REQUEST_LINE)
        if not (48 <= p[n - 3] <= 57 and p[n - 2] == 46 and 48 <= p[n - 1] <= 57):
            return self._refuse(Rule.REQUEST_LINE)
        self._target = PyBytes_FromStringAndSize(<const char *>p + start, i - start)
        self._read_version(p + n - 3)
        if p[start] == 47 and self._method is not _CONNECT:
            if sharp:
                self._refuse(Rule.TARGET)
        elif (rule := check_target(self._method, self._target)) is not None:
            self._refuse(rule)
        return 0

    cdef int _read_status_line(self, const unsigned char *p, Py_ssize_t n) except -1:
        cdef Py_ssize_t i
        if n < 12 or memcmp(p, b"HTTP/", 5) != 0 or p[8] != 32:
            return self._refuse(Rule.STATUS_LINE)
        if not (48 <= p[5] <= 57 and p[6] == 46 and 48 <= p[7] <= 57):
            return self._refuse(Rule.STATUS_LINE)
        if not (49 <= p[9] <= 57 and 48 <= p[10] <= 57 and 48 <= p[11] <= 57):
            return self._refuse(Rule.STATUS_LINE)
        if n > 12:
            if p[12] != 32:
                return self._refuse(Rule.STATUS_LINE)
            for i in range(13, n):
                if not _VALUE[p[i]]:
                    return self._refuse(Rule.STATUS_LINE)
        self._read_version(p + 5)
        self._status = (p[9] - 48) * 100 + (p[10] - 48) * 10 + p[11] - 48
        return 0

    cdef int _read_version(self, const unsigned char *p) except -1:
        if p[0] == 49 and p[2] == 49:
            self._version = _V11
        elif p[0] == 49 and p[2] == 48:
            self._version = _V10
        else:
            self._refuse(Rule.VERSION)
        return 0

    cdef bytes _field_name(self, const unsigned char *p, Py_ssize_t n, Py_ssize_t *colon, Known **known):
        """The name of a field whose octets are all allowed. Raises."""
        cdef Py_ssize_t i = 0
        while i < n and _TCHAR[p[i]]:
            i += 1
        if i == 0 or i == n or p[i] != 58 or not _is_value(p + i + 1, n - i - 1):
            self._refuse(field_rule(PyBytes_FromStringAndSize(<const char *>p, n)))
        colon[0] = i
        return _lower_name(p, i, known)

    cdef int _read_field(self, const unsigned char *p, Py_ssize_t n) except -1:
        cdef Py_ssize_t colon = 0
        cdef int tag = T_NONE
        cdef int options = 0
        cdef long bits = 0
        cdef Known *known
        cdef bytes name, value
        cdef tuple field
        cdef Line *line = _line(p, n) if 8 <= n <= LINE_SIZE else NULL
        if line != NULL and line.size == n and memcmp(line.text, p, n) == 0:
            field = <tuple>line.field
            tag, options, bits = line.tag, line.options, line.bits
            if self._spelling is not None:
                colon = PyBytes_GET_SIZE(<bytes>field[0])
        else:
            name = self._field_name(p, n, &colon, &known)
            value = _stripped(p + colon + 1, n - colon - 1)
            field = (name, value)
            if known != NULL:
                tag, bits = known.tag, known.bits
                if tag == T_CONNECTION:
                    options = _options_in(value)
                    if options & ~(O_CLOSE | O_KEEP_ALIVE):
                        bits |= _NAMING
                if line != NULL and known.repeats:
                    _keep_line(line, p, n, field, tag, options, bits)
            elif PyBytes_GET_SIZE(name) == _XFCC_SIZE and is_like_xfcc(name):
                bits = _XFCC_LIKE
        self._bits |= bits
        if tag:
            if tag == T_HOST:
                self._hosts += 1
                self._host = <bytes>field[1]
            elif tag == T_LENGTH:
                self._lengths += 1
                self._length = <bytes>field[1]
            elif tag == T_CODING:
                self._codings += 1
                self._coding_at = len(self._fields)
            elif tag == T_CONNECTION:
                self._options |= options
            else:
                self._has_upgrade = True
        if self._spelling is not None:
            self._spelling.setdefault(field[0], PyBytes_FromStringAndSize(<const char *>p, colon))
        self._fields.append(field)
        return 0

    cdef int _finish_head(self, list events, Py_ssize_t behind) except -1:
        cdef long long octets = -1
        cdef bint chunked
        cdef bint close = self._version is _V10
        cdef bint upgrade
        cdef int options = self._options
        if self._lengths:
            if self._lengths > 1:
                self._refuse(Rule.CONTENT_LENGTH_TWICE)
            octets = _number(self._length)
            if octets < 0:
                self._refuse(Rule.CONTENT_LENGTH)
        chunked = self._read_coding()
        if options & (O_NO_TOKEN | O_FRAMES):
            # Naming Host or Content-Length would make a relay that obeys drop them, and so change the message.
            self._refuse(Rule.CONNECTION)
        close = close or options & O_CLOSE
        upgrade = self._has_upgrade and self._version is _V11 and options & O_UPGRADE
        if self._server:
            self._finish_request(events, octets, chunked, close, upgrade)
        else:
            self._finish_response(events, octets, chunked, close, upgrade)
        if self._state == WAIT and not self._tunnel:
            self._end_of_theirs(events, behind)
        return 0

    cdef bint _read_coding(self) except -1:
        cdef bytes coding
        if not self._codings:
            return False
        if self._version is _V10:
            self._refuse(Rule.TE_IN_1_0)
        if self._codings > 1:
            self._refuse(Rule.TE_TWICE)
        if self._lengths:
            # RFC 9112 6.3 lets a recipient choose; nothing good sends both: an attack, or a peer that cannot frame.
            self._refuse(Rule.TE_AND_LENGTH)
        coding = self._fields[self._coding_at][1]
        if coding != _CHUNKED:
            if coding.lower() != _CHUNKED:
                self._refuse(Rule.TE_CODING)
            self._fields[self._coding_at] = (_N_CODING, _CHUNKED)
        return True

    cdef int _finish_request(self, list events, long long octets, bint chunked, bint close, bint upgrade) except -1:
        if self._hosts > 1:
            self._refuse(Rule.HOST_TWICE)
        if self._hosts:
            if not _is_authority(self._host):
                self._refuse(Rule.HOST)
        elif self._version is _V11:
            self._refuse(Rule.HOST_MISSING)
        if self._method is _CONNECT:
            if chunked or octets > 0:
                self._refuse(Rule.CONNECT_TARGET)
            # Octets after a refused CONNECT may be meant for the tunnel: they are no requests.
            close = upgrade = True
        cdef RequestHead head = request_head(
            1, self._method, self._target, self._fields, self._version, self._spelled(), _EMPTY, _EMPTY
        )
        head.seen = self._bits
        events.append(head)
        self._has_request = True
        self._request_method = self._method
        self._request_version = self._version
        self._request_tunnel = upgrade
        self._must_close = self._must_close or close
        self._start_head()
        self._start_content(-1 if chunked else octets if octets > 0 else 0)
        return 0

    cdef int _finish_response(self, list events, long long octets, bint chunked, bint close, bint upgrade) except -1:
        cdef int status = self._status
        cdef bint tunnel
        if status == 101 and not (self._request_tunnel and self._request_method is not _CONNECT and upgrade):
            self._refuse(Rule.SWITCH)
        if chunked and (status < 200 or status == 204):
            self._refuse(Rule.TE_STATUS)
        # RFC 9112 6.3, in its order.
        tunnel = status == 101 or (self._request_method is _CONNECT and 200 <= status < 300)
        if self._request_method is _HEAD or status < 200 or status == 204 or status == 304 or tunnel:
            octets = 0
        elif chunked:
            octets = -1
        elif octets < 0:
            octets = -2
            close = True
        cdef list headers = self._fields
        cdef ResponseHead head = response_head(1, status, headers, self._version, self._spelled())
        head.seen = self._bits
        self._start_head()
        if tunnel:
            if self._out != OUT_DONE:
                # In the middle of our request: what we still have to send is no tunnel's.
                raise RemoteProtocolError(Rule.SWITCH.detail, 502)
            events.append(head)
            self._state = WAIT
            self._tunnel = self._must_close = True
        elif status < 200:
            events.append(Informational(1, status, headers))
            self._state = HEAD
        else:
            events.append(head)
            self._must_close = self._must_close or close
            self._start_content(octets)
        return 0

    cdef void _start_content(self, long long octets):
        if octets == -1:
            self._state = CHUNK_LINE
            self._overhead = 0
        elif octets == -2:
            self._state = UNTIL_CLOSE
        elif octets:
            self._state = LENGTH
            self._left = octets
        else:
            self._state = WAIT

    cdef int _read_content(
        self, const unsigned char *p, Py_ssize_t n, Py_ssize_t *place, list events, list chunks, bytes whole
    ) except -1:
        """0: more octets are needed."""
        cdef Py_ssize_t at = place[0]
        cdef Py_ssize_t take = n - at
        if self._state == LENGTH or self._state == CHUNK_DATA or self._state == UNTIL_CLOSE:
            if self._state != UNTIL_CLOSE and take > self._left:
                take = <Py_ssize_t>self._left
            if take == n and whole is not None:
                chunks.append(whole)
            else:
                chunks.append(PyBytes_FromStringAndSize(<const char *>p + at, take))
            place[0] = at + take
            if self._state != UNTIL_CLOSE:
                self._left -= take
                if self._left == 0:
                    if self._state == CHUNK_DATA:
                        self._state = CHUNK_END
                    else:
                        self._state = WAIT
                        self._flush(events, chunks)
                        self._end_of_theirs(events, n - place[0])
            return 1
        if self._state == CHUNK_END:
            if p[at] != (10 if self._cr_seen else 13):
                self._refuse(Rule.CHUNK_END)
            if self._cr_seen:
                self._state = CHUNK_LINE
            self._cr_seen = not self._cr_seen
            place[0] = at + 1
            return 1
        return self._read_line(p, n, place, events, chunks)

    cdef int _read_line(
        self, const unsigned char *p, Py_ssize_t n, Py_ssize_t *place, list events, list chunks
    ) except -1:
        """A chunk line or a line of the trailer section. 0: it has no end yet."""
        cdef Py_ssize_t at = place[0]
        cdef bint trailer = self._state == TRAILER
        cdef Py_ssize_t limit = self._max_trailer - self._section if trailer else _CHUNK_LINE_LIMIT
        cdef Py_ssize_t line_end
        cdef const unsigned char *found = NULL
        if n - at > self._scan:
            found = <const unsigned char *>memchr(p + at + self._scan, 10, n - at - self._scan)
        if found == NULL:
            self._scan = n - at
            if n - at > limit:
                self._refuse(Rule.TRAILER_SIZE if trailer else Rule.CHUNK_LINE_SIZE)
            return 0
        line_end = found - p
        self._scan = 0
        if line_end + 1 - at > limit:
            self._refuse(Rule.TRAILER_SIZE if trailer else Rule.CHUNK_LINE_SIZE)
        if line_end == at or p[line_end - 1] != 13:
            self._refuse(Rule.BARE_LF)
        place[0] = line_end + 1
        if not trailer:
            self._read_chunk_line(p + at, line_end - 1 - at)
            return 1
        self._section += line_end + 1 - at
        if line_end - 1 > at:
            self._read_trailer(p + at, line_end - 1 - at)
            return 1
        self._state = WAIT
        self._flush(events, chunks)
        if self._trailers:
            events.append(Trailers(1, self._trailers))
            self._trailers = None
        self._end_of_theirs(events, n - place[0])
        return 1

    cdef int _read_chunk_line(self, const unsigned char *p, Py_ssize_t n) except -1:
        cdef Py_ssize_t i = 0
        cdef unsigned long long size = 0
        while i < n and i < 16 and _HEX[p[i]] >= 0:
            size = size << 4 | <unsigned long long>_HEX[p[i]]
            i += 1
        if i == 0 or (i < n and not check_chunk_line(PyBytes_FromStringAndSize(<const char *>p, n))):
            self._refuse(Rule.CHUNK_LINE)
        if size > <unsigned long long>_MAX_LENGTH:
            self._refuse(Rule.CHUNK_LINE)
        # Large chunks pay for all that may have been spent; the sum can't overflow.
        if size > 1 << 30:
            self._overhead = 0
        else:
            self._overhead += n + 2 - 16 - 2 * <long long>size
            if self._overhead < 0:
                self._overhead = 0
        if self._overhead > _MAX_OVERHEAD:
            self._refuse(Rule.CHUNK_OVERHEAD)
        if size:
            self._state = CHUNK_DATA
            self._left = <long long>size
        else:
            self._state = TRAILER
            self._section = 0
            self._trailer_count = 0
            self._trailers = []
        return 0

    cdef int _read_trailer(self, const unsigned char *p, Py_ssize_t n) except -1:
        cdef Py_ssize_t colon = 0
        cdef Known *known
        cdef bytes name = self._field_name(p, n, &colon, &known)
        if name in FORBIDDEN_TRAILERS:
            self._refuse(Rule.TRAILER_FIELD)
        self._trailer_count += 1
        if self._trailer_count > self._max_headers:
            self._refuse(Rule.FIELD_COUNT)
        self._trailers.append((name, _stripped(p + colon + 1, n - colon - 1)))
        return 0

    cdef int _flush(self, list events, list chunks) except -1:
        """One Data per read: many small chunks cost the peer little and must not cost us more."""
        if chunks:
            events.append(content(1, chunks[0] if len(chunks) == 1 else _EMPTY.join(chunks)))
            chunks.clear()
        return 0

    cdef int _end_of_theirs(self, list events, Py_ssize_t behind) except -1:
        """Their message is whole. `behind`: octets that came with it and are not read yet."""
        events.append(_end)
        self._theirs_done = True
        if not self._server:
            if behind:
                self._must_close = True
            if self._must_close:
                self._discard()
        elif self._must_close and not self._request_tunnel:
            # RFC 9112 9.6: nothing is a request after a message that said it is the last one.
            self._discard()
        self._next_cycle()
        return 0

    cdef int _next_cycle(self) except -1:
        """Starts the next exchange if this one is over on both sides and another one may follow."""
        if self._out != OUT_DONE:
            return 0
        if self._theirs_done and not self._must_close:
            self._out = OUT_NONE
            self._theirs_done = self._has_request = self._request_tunnel = False
            if self._server:
                self._start_head()
                self._state = HEAD
        elif self._must_close and self._server:
            # Answered, for the last time: what is left of the request, and what follows it, is of no use.
            self._discard()
        return 0

    # -- tunnels ------------------------------------------------------------------------------------

    cdef list _read_tunnel(self, list events):
        if PyByteArray_GET_SIZE(self._buf):
            events.append(content(1, bytes(self._buf)))
            self._buf = bytearray()
        if self._eof and not self._their_tunnel_ended:
            self._closed = self._their_tunnel_ended = True
            events.append(_end)
        return events

    cdef bytes _send_tunnelled(self, event):
        if self._our_tunnel_ended or not isinstance(event, (Data, End)):
            raise LocalProtocolError(f"{type(event).__name__} in a tunnel, or after its end")
        if isinstance(event, End):
            self._our_tunnel_ended = True
            return _EMPTY
        return (<Data>event).data

    # -- out ----------------------------------------------------------------------------------------

    cdef void _kill(self):
        self._dead = self._closed = self._must_close = True
        self._discard()

    cpdef send(self, stream_id, event):
        if stream_id != 1:
            self._kill()
            raise LocalProtocolError("HTTP/1 has one stream, number 1")
        cdef bytes octets = self.encode(event)
        return [octets] if PyBytes_GET_SIZE(octets) else []

    cpdef bytes encode(self, event):
        if self._dead:
            raise LocalProtocolError("send after reset or after an error of ours")
        try:
            return self._encode(event)
        except LocalProtocolError:
            self._kill()
            raise

    cdef bytes _encode(self, event):
        raise NotImplementedError

    cpdef credit(self, stream_id, n):
        return []

    cpdef list reset(self, stream_id, reason):
        self._kill()
        return []

    cpdef list goaway(self):
        self._draining = True
        return []

    cdef bytes _send_content(self, event):
        cdef bytes data
        cdef Py_ssize_t size
        if self._tunnel:
            return self._send_tunnelled(event)
        if self._out != OUT_BODY:
            raise LocalProtocolError(f"{type(event).__name__} without a head before it")
        if type(event) is End:
            return self._send_end()
        if self._out_trailers is not None:
            raise LocalProtocolError(f"{type(event).__name__} after trailers")
        if type(event) is Trailers:
            self._out_trailers = _trailers_to_send((<Trailers>event).headers)
            return _EMPTY
        data = (<Data>event).data
        size = PyBytes_GET_SIZE(data)
        if size == 0 or self._out_bodiless:
            return _EMPTY
        if self._out_left == OUT_CHUNKED:
            return b"%x\r\n%b\r\n" % (size, data)
        if self._out_left != OUT_UNTIL_CLOSE:
            if size > self._out_left:
                raise LocalProtocolError("more content than Content-Length says")
            self._out_left -= size
        return data

    cdef bytes _send_end(self):
        cdef bytes out = _EMPTY
        if not self._out_bodiless:
            if self._out_left == OUT_CHUNKED:
                if self._out_trailers:
                    out = b"0\r\n" + _lines(self._out_trailers) + b"\r\n"
                else:
                    out = b"0\r\n\r\n"
            elif self._out_left > 0:
                raise LocalProtocolError("less content than Content-Length says")
        self._out = OUT_DONE
        self._out_trailers = None
        self._next_cycle()
        return out

    cdef list _settle_connection(self, list headers, bint has_connection):
        """Our Connection field and `must_close` say the same afterwards."""
        cdef int options
        if not has_connection and not self._must_close:
            return headers
        options = _options(headers) if has_connection else 0
        if options & O_CLOSE:
            self._must_close = True
        if self._must_close and (not options & O_CLOSE or options & O_KEEP_ALIVE):
            kept = []
            if has_connection:
                named = connection_options([(name.lower(), value) for name, value in headers])
                kept = [option for option in named if option not in (b"close", b"keep-alive")]
                headers = [field for field in headers if field[0].lower() != _N_CONNECTION]
            headers = [*headers, (_N_CONNECTION, b", ".join([*kept, b"close"]))]
        return headers


cdef class H1NativeServer(_Connection):
    """Our side of a downstream connection: requests in, responses out. As `h1_reference.H1ReferenceServer`."""

    def __cinit__(self):
        self._server = True

    @property
    def is_full(self):
        """Pause reading: so much is pipelined that more is not wanted before `resume` (one read may overshoot)."""
        return self.is_stuffed()

    @property
    def reusable(self):
        return self.is_reusable()

    cpdef bint is_reusable(self) except -1:
        return self._is_idle() and not self._draining and self._buffered() == 0

    cpdef list resume(self):
        return self._read(_EMPTY)

    cpdef bint is_stuffed(self) except -1:
        return self._state == WAIT and not self._tunnel and PyByteArray_GET_SIZE(self._buf) >= self._max_pipelined

    cdef bytes _encode(self, event):
        if type(event) is ResponseHead:
            return self._send_head(<ResponseHead>event)
        if type(event) is Data or type(event) is End or type(event) is Trailers:
            return self._send_content(event)
        if type(event) is Informational:
            return self._send_informational(<Informational>event)
        raise LocalProtocolError(f"a server does not send {type(event).__name__}")

    cdef bytes _send_head(self, ResponseHead event):
        cdef int status = event.status
        cdef Outgoing checked = _checked(event.headers)
        cdef list headers = checked.headers
        cdef bint not_1_1
        cdef bint bodiless
        if status == 101 or (self._has_request and self._request_method is _CONNECT and 200 <= status < 300):
            return self._send_tunnel_head(status, checked, event.spelling)
        if self._out != OUT_NONE or self._tunnel or not 200 <= status <= 999:
            raise LocalProtocolError(f"a response head with status {status} in the wrong place")
        # Without a request it is a broken or late head that is answered: what the client understands was said before,
        # if ever.
        not_1_1 = self._request_version is not _V11
        if self._draining or not self._has_request:
            self._must_close = True
        if not self._has_request:
            self._discard()
        if status == 204:
            # RFC 9110 8.6, RFC 9112 6.1: neither field in a 204.
            headers = _without_framing(headers)
        elif not_1_1:
            if checked.left == OUT_CHUNKED:
                headers = _without_framing(headers)
                checked.left = OUT_UNTIL_CLOSE
        elif checked.left == OUT_UNTIL_CLOSE and status != 304:
            headers = [*headers, (_N_CODING, _CHUNKED)]
            checked.left = OUT_CHUNKED
        headers = self._settle_connection(headers, checked.has_connection)
        bodiless = status == 204 or status == 304 or (self._has_request and self._request_method is _HEAD)
        self._out = OUT_BODY
        self._out_bodiless = bodiless
        self._out_left = checked.left
        self._out_trailers = None
        return _response_head(status, headers, event.spelling)

    cdef bytes _send_tunnel_head(self, int status, Outgoing checked, spelling):
        if self._out != OUT_NONE or self._tunnel or not (
            self._has_request and self._request_tunnel and self._theirs_done
        ):
            raise LocalProtocolError("a tunnel that nobody asked for, or whose request is not complete")
        if status == 101 and (
            self._request_version is not _V11 or self._request_method is _CONNECT or not checked.asks_to_upgrade()
        ):
            raise LocalProtocolError(Rule.SWITCH.detail)
        # RFC 9110 8.6, 9.3.6, RFC 9112 6.1: neither field in a 1xx or in a 2xx to CONNECT.
        headers = _without_framing(checked.headers) if checked.framed else checked.headers
        self._tunnel = self._must_close = True
        return _response_head(status, headers, spelling)

    cdef bytes _send_informational(self, Informational event):
        cdef int status = event.status
        cdef Outgoing checked = _checked(event.headers)
        if status == 101:
            raise LocalProtocolError("101 is a ResponseHead")
        if self._tunnel or not 100 <= status <= 199:
            raise LocalProtocolError(f"an informational head with status {status} in the wrong place")
        if self._has_request and self._request_version is _V10:
            return _EMPTY  # RFC 9110 15.2: never to an HTTP/1.0 client
        if self._out != OUT_NONE or not self._has_request:
            raise LocalProtocolError(f"an informational head with status {status} in the wrong place")
        headers = _without_framing(checked.headers) if checked.framed else checked.headers
        return _response_head(status, headers, None)


cdef class H1NativeClient(_Connection):
    """Our side of an upstream connection: requests out, responses in. As `h1_reference.H1ReferenceClient`."""

    @property
    def must_close(self):
        return self.is_last()

    @property
    def reusable(self):
        return self.is_reusable()

    cpdef bint is_last(self) except -1:
        return self._must_close or self._draining

    cpdef bint is_reusable(self) except -1:
        return self._is_idle() and not self._draining

    cdef bytes _encode(self, event):
        if type(event) is RequestHead:
            return self._send_head(<RequestHead>event)
        if self._error is not None:
            raise LocalProtocolError("the connection is broken")
        if type(event) is Data or type(event) is End or type(event) is Trailers:
            return self._send_content(event)
        raise LocalProtocolError(f"a client does not send {type(event).__name__}")

    cdef bytes _send_head(self, RequestHead event):
        cdef bytes method = event.method
        cdef bytes target = event.target
        cdef Outgoing checked
        cdef list headers
        if not self._is_idle():
            raise LocalProtocolError("the connection is not ready for another request")
        known = _METHODS.get(method)
        if known is not None:
            method = <bytes>known
        if method is _CONNECT or not _is_origin_form(target) or (known is None and not is_token(method)):
            if (rule := check_target(method, target)) is not None:
                raise LocalProtocolError(rule.detail)
            if not _is_visible(target):
                raise LocalProtocolError(Rule.TARGET.detail)
        checked = _checked(event.headers)
        if checked.hosts != 1 or not _is_authority(checked.host):
            raise LocalProtocolError(Rule.HOST.detail)
        if method is _CONNECT and checked.framed:
            raise LocalProtocolError(Rule.CONNECT_TARGET.detail)
        if self._draining:
            self._must_close = True
        headers = self._settle_connection(checked.headers, checked.has_connection)
        self._out = OUT_BODY
        self._out_bodiless = False
        self._out_left = checked.left if checked.framed else 0
        self._out_trailers = None
        self._has_request = True
        self._request_method = method
        self._request_tunnel = method is _CONNECT or checked.asks_to_upgrade()
        self._start_head()
        self._state = HEAD
        return _head(method, _SPACE, target, _VERSION_END, headers, event.spelling)


# --- what is sent


cdef class Outgoing:
    """Fields that may be sent, and what they say. They are the sender's: not to be changed. `left`: as of `_Connection._out_left`."""

    cdef list headers
    cdef bint framed
    cdef long long left
    cdef int hosts
    cdef bytes host
    cdef bint has_connection
    cdef bint has_upgrade

    cdef bint asks_to_upgrade(self):
        if not (self.has_upgrade and self.has_connection):
            return False
        return _options(self.headers) & O_UPGRADE


cdef Outgoing _checked(list fields):
    cdef Outgoing out = Outgoing.__new__(Outgoing)
    cdef bytes name
    cdef bytes value
    cdef int tag
    out.headers = fields
    out.left = OUT_UNTIL_CLOSE
    for name, value in fields:
        tag = _check_field(name, value)
        if not tag:
            continue
        if tag == T_LENGTH or tag == T_CODING:
            if out.framed:
                raise LocalProtocolError("more than one field that frames the content")
            out.framed = True
            if tag == T_LENGTH:
                out.left = _number(value)
                if out.left < 0:
                    raise LocalProtocolError(Rule.CONTENT_LENGTH.detail)
            else:
                if value != _CHUNKED:
                    if value.lower() != _CHUNKED:
                        raise LocalProtocolError(Rule.TE_CODING.detail)
                    out.headers = [(n, _CHUNKED) if n is name else (n, v) for n, v in out.headers]
                out.left = OUT_CHUNKED
        elif tag == T_HOST:
            out.hosts += 1
            out.host = value
        elif tag == T_CONNECTION:
            out.has_connection = True
        else:
            out.has_upgrade = True
    return out


cdef int _check_field(bytes name, bytes value) except -1:
    """The tag of a field that may be sent."""
    cdef const unsigned char *p = <const unsigned char *>PyBytes_AS_STRING(name)
    cdef Py_ssize_t n = PyBytes_GET_SIZE(name)
    cdef Py_ssize_t i
    cdef int tag = T_NONE
    cdef unsigned int at
    cdef Known *known
    if n == 0:
        raise LocalProtocolError(Rule.FIELD_NAME.detail)
    at = _slot(_LOWER[p[0]], _LOWER[p[n - 1]], n)
    while True:
        known = &_known[at]
        if known.size == 0:
            for i in range(n):
                if not _TCHAR[p[i]]:
                    raise LocalProtocolError(Rule.FIELD_NAME.detail)
            break
        if known.size == n:
            # Mostly it is the very object that reading gave.
            i = n if known.text == p else 0
            while i < n and _LOWER[p[i]] == known.text[i]:
                i += 1
            if i == n:
                tag = known.tag
                break
        at = (at + 1) & 255
    p = <const unsigned char *>PyBytes_AS_STRING(value)
    n = PyBytes_GET_SIZE(value)
    if not _is_value(p, n):
        raise LocalProtocolError(Rule.FIELD_VALUE.detail)
    if n and (p[0] == 32 or p[0] == 9 or p[n - 1] == 32 or p[n - 1] == 9):
        raise LocalProtocolError(Rule.FIELD_VALUE.detail)
    return tag


cdef list _trailers_to_send(fields):
    cdef Outgoing checked = _checked(fields)
    for name, _ in checked.headers:
        if name.lower() in FORBIDDEN_TRAILERS:
            raise LocalProtocolError(Rule.TRAILER_FIELD.detail)
    return checked.headers


cdef list _without_framing(list headers):
    return [field for field in headers if field[0].lower() not in (_N_LENGTH, _N_CODING)]


cdef bytes _response_head(int status, list headers, spelling):
    return _head(<bytes>_STATUS_LINES[status], _EMPTY, _EMPTY, _EMPTY, headers, spelling)  # 100 to 999: checked


cdef bytes _VERSION_END = b" HTTP/1.1\r\n"
cdef bytes _SPACE = b" "
cdef list _STATUS_LINES = [b"HTTP/1.1 %d %b\r\n" % (status, REASON_PHRASES.get(status, b"")) for status in range(1000)]


cdef bytes _head(bytes a, bytes b, bytes c, bytes d, list headers, spelling):
    """The first line from its four parts, the fields, an empty line."""
    cdef char *out
    cdef bytes made
    headers = _spelled(headers, spelling)
    made = PyBytes_FromStringAndSize(
        NULL,
        PyBytes_GET_SIZE(a) + PyBytes_GET_SIZE(b) + PyBytes_GET_SIZE(c) + PyBytes_GET_SIZE(d) + _lines_size(headers) + 2,
    )
    out = _put(_put(_put(_put(PyBytes_AS_STRING(made), a), b), c), d)
    out = _put_lines(out, headers)
    out[0] = 13
    out[1] = 10
    return made


cdef inline char *_put(char *out, bytes part) noexcept:
    cdef Py_ssize_t size = PyBytes_GET_SIZE(part)
    memcpy(out, PyBytes_AS_STRING(part), size)
    return out + size


cdef list _spelled(list headers, spelling):
    return [(spelling.get(field[0], field[0]), field[1]) for field in headers] if spelling else headers


cdef Py_ssize_t _lines_size(list headers):
    cdef Py_ssize_t size = 0
    cdef bytes name
    cdef bytes value
    for name, value in headers:
        size += PyBytes_GET_SIZE(name) + PyBytes_GET_SIZE(value) + 4
    return size


cdef char *_put_lines(char *out, list headers):
    """At `out` there is room for `_lines_size`."""
    cdef bytes name
    cdef bytes value
    for name, value in headers:
        out = _put(out, name)
        out[0] = 58
        out[1] = 32
        out = _put(out + 2, value)
        out[0] = 13
        out[1] = 10
        out += 2
    return out


cdef bytes _lines(list headers):
    cdef bytes made = PyBytes_FromStringAndSize(NULL, _lines_size(headers))
    _put_lines(PyBytes_AS_STRING(made), headers)
    return made


# --- pieces of heads


cdef int _options(list headers) except -1:
    """Of all Connection fields (O_...), whatever the case of names."""
    cdef int found = 0
    cdef bytes name
    cdef bytes value
    for name, value in headers:
        if name is _N_CONNECTION or (
            PyBytes_GET_SIZE(name) == 10 and _same(<const unsigned char *>PyBytes_AS_STRING(name), b"connection", 10)
        ):
            found |= _options_in(value)
    return found


cdef int _options_in(bytes value) noexcept:
    """Empty list elements count for nothing."""
    cdef const unsigned char *p = <const unsigned char *>PyBytes_AS_STRING(value)
    cdef Py_ssize_t n = PyBytes_GET_SIZE(value)
    cdef Py_ssize_t start = 0
    cdef Py_ssize_t end, i
    cdef int found = 0
    while start < n:
        end = start
        while end < n and p[end] != 44:
            end += 1
        i = end
        while start < i and (p[start] == 32 or p[start] == 9):
            start += 1
        while i > start and (p[i - 1] == 32 or p[i - 1] == 9):
            i -= 1
        if i > start:
            found |= _option(p + start, i - start)
        start = end + 1
    return found


cdef int _option(const unsigned char *p, Py_ssize_t n) noexcept:
    cdef Py_ssize_t i
    for i in range(n):
        if not _TCHAR[p[i]]:
            return O_NO_TOKEN
    if n == 5 and _same(p, b"close", 5):
        return O_CLOSE
    if n == 10 and _same(p, b"keep-alive", 10):
        return O_KEEP_ALIVE
    if n == 7 and _same(p, b"upgrade", 7):
        return O_UPGRADE
    if (n == 4 and _same(p, b"host", 4)) or (n == 14 and _same(p, b"content-length", 14)):
        return O_FRAMES
    return O_OTHER


cdef bint _same(const unsigned char *p, const char *text, Py_ssize_t n) noexcept:
    """`text` is in lower case."""
    cdef Py_ssize_t i
    for i in range(n):
        if _LOWER[p[i]] != <unsigned char>text[i]:
            return False
    return True


cdef bytes _stripped(const unsigned char *p, Py_ssize_t n):
    """Without SP and HTAB around it."""
    while n and (p[0] == 32 or p[0] == 9):
        p += 1
        n -= 1
    while n and (p[n - 1] == 32 or p[n - 1] == 9):
        n -= 1
    return PyBytes_FromStringAndSize(<const char *>p, n)


cdef long long _number(bytes digits):
    """Of a Content-Length; -1 when it is none."""
    cdef const unsigned char *p = <const unsigned char *>PyBytes_AS_STRING(digits)
    cdef Py_ssize_t n = PyBytes_GET_SIZE(digits)
    cdef Py_ssize_t i
    cdef unsigned long long value = 0
    if n < 1 or n > 19:
        return -1
    for i in range(n):
        if not 48 <= p[i] <= 57:
            return -1
        value = value * 10 + (p[i] - 48)  # 19 digits fit 64 bits
    return <long long>value if value <= <unsigned long long>_MAX_LENGTH else -1


cdef bint _is_authority(bytes value):
    """The usual forms here, all others by `strict`."""
    cdef const unsigned char *p = <const unsigned char *>PyBytes_AS_STRING(value)
    cdef Py_ssize_t n = PyBytes_GET_SIZE(value)
    cdef Py_ssize_t i = 0
    while i < n and _REG_NAME[p[i]]:
        i += 1
    if i == n and 0 < n <= 255:
        return True
    cdef long port = 0
    if 0 < i <= 255 and p[i] == 58 and 1 < n - i <= 6:
        i += 1
        while i < n and 48 <= p[i] <= 57:
            port = port * 10 + p[i] - 48
            i += 1
        if i == n and port <= 65535:
            return True
    return check_authority(value)


cdef bint _is_origin_form(bytes target):
    cdef const unsigned char *p = <const unsigned char *>PyBytes_AS_STRING(target)
    cdef Py_ssize_t n = PyBytes_GET_SIZE(target)
    cdef Py_ssize_t i
    if n == 0 or p[0] != 47:
        return False
    for i in range(n):
        if not 0x21 <= p[i] <= 0x7E or p[i] == 35:
            return False
    return True


cdef bint _is_visible(bytes target):
    cdef const unsigned char *p = <const unsigned char *>PyBytes_AS_STRING(target)
    cdef Py_ssize_t i
    for i in range(PyBytes_GET_SIZE(target)):
        if not 0x21 <= p[i] <= 0x7E:
            return False
    return PyBytes_GET_SIZE(target) > 0
