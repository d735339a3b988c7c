# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""The HTTP/2 engines that are used: the rules of `h2_strict` and the behaviour of `h2_reference`, compiled.

Own code, framing and HPACK included, and not libnghttp2 by way of the package ngh2. That was tried first: a header list
over its limit leaves a connection that is dead without a GOAWAY, where we owe one stream a 431; a request that it refuses
is no event, so nobody could log or count it; PRIORITY and frames of unknown types are not seen at all; its budgets run on
a clock of its own; and it accepts a Host that differs from :authority. libnghttp2 bound directly would tell more, but
decides by itself what is ignored, reset or fatal, so it could be compared with the reference only loosely, every head
would be read a second time, and an installation would need its headers. Here the rules are the reference's, step by
step, and the tests hold the two against each other. Nor is it slower: both ends of a small exchange cost 5.3 us, in ngh2
6.8 (2 cores, Debian 12, the same fields).

How it is fast: entries of HPACK tables are the very tuples that events carry, and remember what the rules say of them, so
a field that comes again costs a reference. Heads with nothing unusual are read in one pass over their fields; all others
are given to `h2_strict` as they are. Content goes out without a copy where a piece is a frame, and is copied once on its
way in.
"""

cimport cython

from collections import deque

from cpython.bytearray cimport PyByteArray_AS_STRING, PyByteArray_GET_SIZE
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.dict cimport PyDict_GetItem
from cpython.list cimport PyList_GetSlice
from cpython.mem cimport PyMem_Free, PyMem_Malloc, PyMem_Realloc
from cpython.object cimport PyObject
from cpython.ref cimport Py_DECREF, Py_INCREF, Py_XDECREF
from cpython.tuple cimport PyTuple_GET_ITEM, PyTuple_GET_SIZE
from libc.string cimport memcpy, memset

from hpack.huffman_table import HUFFMAN_TABLE
from hpack.table import HeaderTable

from netproxy.codec import h2_strict
from netproxy.codec.engine cimport H2Engine
from netproxy.codec.events cimport Data, End, Informational, RequestHead, ResponseHead, Trailers
from netproxy.codec.events cimport content, end, request_head, response_head

from netproxy.codec.events import ConnectionClosed, GoAway, PeerSettings, PingAck, RequestRefused, Reset, Writable
from netproxy.codec.h2_strict import (
    H2Limits,
    MalformedError,
    Rule,
    code_name,
    read_request,
    read_response,
    read_trailers,
    request_fields,
    response_fields,
    trailer_fields,
)
from netproxy.codec.strict import FORBIDDEN_TRAILERS, check_authority
from netproxy.errors import LocalProtocolError, RemoteProtocolError

cdef enum:
    F_DATA = 0
    F_HEADERS = 1
    F_PRIORITY = 2
    F_RST_STREAM = 3
    F_SETTINGS = 4
    F_PUSH_PROMISE = 5
    F_PING = 6
    F_GOAWAY = 7
    F_WINDOW_UPDATE = 8
    F_CONTINUATION = 9

cdef enum:
    END_STREAM = 1
    ACK = 1
    END_HEADERS = 4
    PADDED = 8
    PRIORITY = 32

cdef enum:
    NO_ERROR = 0
    STREAM_CLOSED = 5
    REFUSED_STREAM = 7
    CANCEL = 8

cdef long long _MAX_WINDOW = h2_strict.MAX_WINDOW
cdef unsigned int _MAX_ID = h2_strict.MAX_STREAM_ID
cdef Py_ssize_t _DATA_FRAME = h2_strict.DATA_FRAME
cdef Py_ssize_t _ZERO_COPY = 4096
cdef int _BOMB = h2_strict.HEADER_BOMB
cdef int _MAX_SETTINGS = h2_strict.MAX_SETTINGS_ENTRIES
cdef int _MAX_PINGS = h2_strict.MAX_PINGS
cdef int _MAX_REMEMBERED = h2_strict.MAX_REMEMBERED_RESETS
cdef int _ASSUMED_MAX_STREAMS = h2_strict.ASSUMED_MAX_STREAMS
cdef double _EXCHANGE_EARNS = h2_strict.EXCHANGE_EARNS
cdef Py_ssize_t _CONTENT_EARNS = h2_strict.CONTENT_EARNS
cdef Py_ssize_t _OCTETS_PER_GLITCH = h2_strict.OCTETS_PER_GLITCH
cdef bytes _PREFACE = h2_strict.PREFACE
cdef bytes _DRAIN_PING = h2_strict.DRAIN_PING

# --- octets and names

cdef unsigned char _LOWER_TOKEN[256]
cdef unsigned char _TOKEN[256]
cdef unsigned char _VALUE[256]
cdef unsigned char _PATH[256]

# What is known of a field by its name, and with a valid value of the field.
cdef enum:
    T_ODD  # h2_strict decides
    T_PLAIN
    T_NO_TRAILER  # like T_PLAIN, but not in trailers
    T_COOKIE
    T_LENGTH
    T_TE
    T_HOST
    T_METHOD
    T_SCHEME
    T_AUTHORITY
    T_PATH
    T_STATUS

# How a field is written.
cdef enum:
    W_INDEX = 0
    W_PLAIN = 0x100  # not worth a place in the table
    W_NEVER = 0x200  # a secret (RFC 7541 section 7.1)
    T_MASK = 0xFF
    W_NAME = 16  # from this bit on: the name's place in the static table


def _fill():
    cdef int octet
    for octet in range(256):
        _TOKEN[octet] = octet < 128 and (chr(octet).isalnum() or chr(octet) in "!#$%&'*+-.^_`|~")
        _LOWER_TOKEN[octet] = _TOKEN[octet] and not 65 <= octet <= 90
        _VALUE[octet] = octet == 9 or (octet >= 32 and octet != 127)
        _PATH[octet] = 0x21 <= octet <= 0x7E and octet != 0x23


_fill()

cdef dict _tags = {name: T_NO_TRAILER for name in FORBIDDEN_TRAILERS}
_tags.update({name: T_ODD for name in h2_strict.CONNECTION_FIELDS})
_tags.update({
    b":method": T_METHOD, b":scheme": T_SCHEME, b":authority": T_AUTHORITY, b":path": T_PATH | W_PLAIN, b":status": T_STATUS,
    b"host": T_HOST, b"content-length": T_LENGTH | W_PLAIN, b"cookie": T_COOKIE | W_NEVER, b"te": T_TE,
    b"authorization": T_NO_TRAILER | W_NEVER, b"proxy-authorization": T_NO_TRAILER | W_NEVER,
    b"set-cookie": T_NO_TRAILER | W_NEVER, b"age": T_NO_TRAILER | W_PLAIN, b"location": T_NO_TRAILER | W_PLAIN,
    b"content-range": T_NO_TRAILER | W_PLAIN, b"range": T_NO_TRAILER | W_PLAIN,
    b"if-modified-since": T_NO_TRAILER | W_PLAIN, b"if-none-match": T_NO_TRAILER | W_PLAIN,
})
for _name in (b"etag", b"last-modified", b"x-request-id", b"traceparent", b"tracestate", b"x-b3-traceid", b"x-b3-spanid",
              b"grpc-timeout", b"grpc-message"):
    _tags[_name] = T_PLAIN | W_PLAIN

cdef dict _authorities = {}  # those that were found valid lately
cdef bytes _CONNECT = b"CONNECT"
cdef bytes _HEAD = b"HEAD"
cdef bytes _HTTP = b"http"
cdef bytes _HTTPS = b"https"
cdef bytes _HOST = b"host"
cdef bytes _V2 = b"2"
cdef bytes _EMPTY = b""


cdef int _tag(bytes name) except -1:
    cdef PyObject *found = PyDict_GetItem(_tags, name)
    if found != NULL:
        return <int><object>found
    cdef const unsigned char *p = <const unsigned char *>PyBytes_AS_STRING(name)
    cdef Py_ssize_t i, n = PyBytes_GET_SIZE(name)
    if n == 0:
        return T_ODD
    for i in range(n):
        if not _LOWER_TOKEN[p[i]]:
            return T_ODD
    return T_PLAIN


cdef long long _number(bytes digits) noexcept:
    """Of a T_LENGTH."""
    cdef const unsigned char *p = <const unsigned char *>PyBytes_AS_STRING(digits)
    cdef Py_ssize_t i
    cdef long long number = 0
    for i in range(PyBytes_GET_SIZE(digits)):
        number = number * 10 + p[i] - 48
    return number


cdef bint _is_authority(bytes value) except -1:
    if PyDict_GetItem(_authorities, value) != NULL:
        return True
    if not check_authority(value):
        return False
    if len(_authorities) >= 1024:
        _authorities.clear()
    _authorities[value] = None
    return True


cdef int _kind(int tag, bytes value) except -1:
    """What the field is: `tag` without its W bits, T_ODD if the value is not as usual."""
    cdef const unsigned char *p = <const unsigned char *>PyBytes_AS_STRING(value)
    cdef Py_ssize_t i, n = PyBytes_GET_SIZE(value)
    tag &= T_MASK
    if tag == T_ODD:
        return T_ODD
    if tag == T_PATH:
        if n == 0 or p[0] != 0x2F:
            return T_ODD
        for i in range(n):
            if not _PATH[p[i]]:
                return T_ODD
        return T_PATH
    if n:
        if p[0] == 32 or p[0] == 9 or p[n - 1] == 32 or p[n - 1] == 9:
            return T_ODD
        for i in range(n):
            if not _VALUE[p[i]]:
                return T_ODD
    if tag <= T_COOKIE:
        return tag
    if tag == T_LENGTH:
        # 18 digits fit; more are left to h2_strict.
        if n == 0 or n > 18:
            return T_ODD
        for i in range(n):
            if not 0x30 <= p[i] <= 0x39:
                return T_ODD
        return tag
    if tag == T_TE:
        return T_NO_TRAILER if n == 8 and value == b"trailers" else T_ODD
    if tag == T_METHOD:
        if n == 0 or value == _CONNECT:
            return T_ODD
        for i in range(n):
            if not _TOKEN[p[i]]:
                return T_ODD
        return tag
    if tag == T_SCHEME:
        return tag if value == _HTTP or value == _HTTPS else T_ODD
    if tag == T_AUTHORITY or tag == T_HOST:
        return tag if _is_authority(value) else T_ODD
    # T_STATUS
    if n == 3 and 0x31 <= p[0] <= 0x39 and 0x30 <= p[1] <= 0x39 and 0x30 <= p[2] <= 0x39:
        return tag
    return T_ODD


# --- HPACK

cdef struct Entry:
    PyObject *pair  # (name, value)
    int tag
    int kind
    int size

cdef enum:
    TABLE_OCTETS = 4096
    TABLE_ENTRIES = 128
    STATIC_ENTRIES = 61

cdef Entry _static[62]
cdef list _static_kept = []
cdef dict _static_pairs = {}

cdef struct Nibble:
    unsigned short state
    unsigned char flags
    unsigned char symbol

cdef Nibble _huffman[4096]
cdef enum:
    COMPLETE = 1
    EMIT = 2
    FAIL = 4


def _fill_tables():
    cdef int i
    for i, (name, _) in enumerate(HeaderTable.STATIC_TABLE):
        name = bytes(name)
        if _tags.setdefault(name, T_PLAIN) < 1 << W_NAME:
            _tags[name] |= (i + 1) << W_NAME
    for i, (state, flags, symbol) in enumerate(HUFFMAN_TABLE):
        _huffman[i].state = state
        _huffman[i].flags = flags
        _huffman[i].symbol = symbol
    for i, (name, value) in enumerate(HeaderTable.STATIC_TABLE):
        pair = (bytes(name), bytes(value))
        _static_kept.append(pair)
        _static[i + 1].pair = <PyObject *>pair
        _static[i + 1].tag = _tag(pair[0])
        _static[i + 1].kind = _kind(_static[i + 1].tag, pair[1])
        _static[i + 1].size = len(name) + len(value) + 32
        _static_pairs.setdefault(pair, i + 1)


_fill_tables()


cdef bytes _decode_huffman(const unsigned char *p, Py_ssize_t n):
    """None if it is broken."""
    if n == 0:
        return _EMPTY
    # The shortest code has five bits.
    cdef bytes out = PyBytes_FromStringAndSize(NULL, n * 8 // 5 + 1)
    cdef unsigned char *o = <unsigned char *>PyBytes_AS_STRING(out)
    cdef Py_ssize_t i, at = 0
    cdef unsigned int state = 0
    cdef Nibble *nibble
    for i in range(n):
        nibble = &_huffman[state * 16 + (p[i] >> 4)]
        if nibble.flags & FAIL:
            return None
        if nibble.flags & EMIT:
            o[at] = nibble.symbol
            at += 1
        state = nibble.state
        nibble = &_huffman[state * 16 + (p[i] & 15)]
        if nibble.flags & FAIL:
            return None
        if nibble.flags & EMIT:
            o[at] = nibble.symbol
            at += 1
        state = nibble.state
    if not nibble.flags & COMPLETE:
        return None
    return out[:at]


cdef struct Cursor:
    const unsigned char *p
    Py_ssize_t at
    Py_ssize_t end


cdef bint _integer(Cursor *c, int bits, unsigned long long *value) noexcept:
    """False if it is cut off or too long (more than five octets behind the first, as in hpack)."""
    cdef unsigned int most = (1 << bits) - 1
    cdef int shift = 0
    cdef unsigned char octet
    if c.at >= c.end:
        return False
    value[0] = c.p[c.at] & most
    c.at += 1
    if value[0] < most:
        return True
    while c.at < c.end:
        octet = c.p[c.at]
        c.at += 1
        value[0] += <unsigned long long>(octet & 127) << shift
        if octet < 128:
            return True
        shift += 7
        if shift > 28:
            return False
    return False


cdef bytes _string(Cursor *c):
    """None if it is broken."""
    cdef unsigned long long size
    cdef bint huffman
    cdef bytes value
    if c.at >= c.end:
        return None
    huffman = c.p[c.at] >= 128
    if not _integer(c, 7, &size) or size > <unsigned long long>(c.end - c.at):
        return None
    if huffman:
        value = _decode_huffman(c.p + c.at, <Py_ssize_t>size)
    else:
        value = PyBytes_FromStringAndSize(<const char *>c.p + c.at, <Py_ssize_t>size)
    c.at += <Py_ssize_t>size
    return value


# What a header block turned out to be.
cdef struct Found:
    bint odd
    bint too_large
    bint not_in_trailers
    int pseudo  # how many
    unsigned int seen  # bits of pseudo kinds
    int cookies
    int lengths
    int fields
    long long size


cdef class _Decoder:
    cdef Entry _ring[TABLE_ENTRIES]
    cdef int _newest
    cdef int _count
    cdef int _size
    cdef int _most
    cdef Found found
    cdef list fields
    cdef long long length
    cdef bytes method
    cdef bytes scheme
    cdef bytes authority
    cdef bytes path
    cdef int status

    def __cinit__(self):
        memset(self._ring, 0, sizeof(self._ring))
        self._most = TABLE_OCTETS

    def __dealloc__(self):
        self._evict(0)

    cdef void _evict(self, int most) noexcept:
        cdef int oldest
        while self._count and self._size > most:
            oldest = (self._newest - self._count + 1) & (TABLE_ENTRIES - 1)
            self._size -= self._ring[oldest].size
            self._count -= 1
            Py_XDECREF(self._ring[oldest].pair)
            self._ring[oldest].pair = NULL

    cdef void _add(self, tuple pair, int tag, int kind, int size) noexcept:
        cdef Entry *entry
        if size > self._most:
            self._evict(0)
            return
        self._evict(self._most - size)
        self._newest = (self._newest + 1) & (TABLE_ENTRIES - 1)
        self._count += 1
        self._size += size
        entry = &self._ring[self._newest]
        Py_INCREF(pair)
        entry.pair = <PyObject *>pair
        entry.tag = tag
        entry.kind = kind
        entry.size = size

    cdef Entry *_get(self, unsigned long long index) noexcept:
        if index == 0:
            return NULL
        if index <= STATIC_ENTRIES:
            return &_static[index]
        index -= STATIC_ENTRIES + 1
        if index >= <unsigned long long>self._count:
            return NULL
        return &self._ring[(self._newest - <int>index) & (TABLE_ENTRIES - 1)]

    cdef object decode(self, const unsigned char *p, Py_ssize_t n, long long max_size, int max_fields):
        """The rule that the block breaks, or None: `found` and `fields` then say what is in it."""
        cdef Cursor c
        cdef unsigned char first
        cdef unsigned long long index
        cdef Entry *entry
        cdef tuple pair
        cdef bytes name, value
        cdef int tag, kind
        cdef long long size
        cdef bint indexed
        cdef list fields = []
        c.p = p
        c.at = 0
        c.end = n
        memset(&self.found, 0, sizeof(Found))
        self.fields = fields
        self.length = -1
        self.method = self.scheme = self.authority = self.path = None
        self.status = 0
        while c.at < n:
            first = p[c.at]
            if first & 0x80:
                if not _integer(&c, 7, &index):
                    return Rule.HPACK
                entry = self._get(index)
                if entry == NULL:
                    return Rule.HPACK
                pair = <tuple>entry.pair
                kind = entry.kind
                size = entry.size
            elif first & 0x60 == 0x20:
                if self.found.fields or not _integer(&c, 5, &index) or index > TABLE_OCTETS:
                    return Rule.HPACK
                self._most = <int>index
                self._evict(self._most)
                continue
            else:
                indexed = first & 0x40
                if not _integer(&c, 6 if indexed else 4, &index):
                    return Rule.HPACK
                if index:
                    entry = self._get(index)
                    if entry == NULL:
                        return Rule.HPACK
                    name = <bytes>PyTuple_GET_ITEM(<tuple>entry.pair, 0)
                    tag = entry.tag
                else:
                    name = _string(&c)
                    if name is None:
                        return Rule.HPACK
                    tag = _tag(name)
                value = _string(&c)
                if value is None:
                    return Rule.HPACK
                kind = _kind(tag, value)
                pair = (name, value)
                size = PyBytes_GET_SIZE(name) + PyBytes_GET_SIZE(value) + 32
                if indexed:
                    self._add(pair, tag, kind, <int>min(size, 0x7FFFFFFF))
            self.found.fields += 1
            self.found.size += size
            if self.found.size > max_size or self.found.fields > max_fields:
                if self.found.size > max_size * _BOMB:
                    return Rule.BOMB
                self.found.too_large = True
                continue
            fields.append(pair)
            self._note(pair, kind)
        return None

    cdef int _note(self, tuple pair, int kind) except -1:
        cdef Found *found = &self.found
        cdef bytes value
        if kind == T_PLAIN:
            return 0
        if kind == T_NO_TRAILER:
            found.not_in_trailers = True
            return 0
        if kind == T_ODD or kind == T_HOST:
            found.odd = True
            return 0
        value = <bytes>PyTuple_GET_ITEM(pair, 1)
        if kind == T_COOKIE:
            found.not_in_trailers = True
            found.cookies += 1
            if found.cookies > 1:
                found.odd = True
        elif kind == T_LENGTH:
            found.not_in_trailers = True
            found.lengths += 1
            if found.lengths > 1:
                found.odd = True
            else:
                self.length = _number(value)
        else:
            if found.seen & (1 << kind) or found.pseudo != found.fields - 1:
                found.odd = True
            found.seen |= 1 << kind
            found.pseudo += 1
            if kind == T_METHOD:
                self.method = value
            elif kind == T_SCHEME:
                self.scheme = value
            elif kind == T_AUTHORITY:
                self.authority = value
            elif kind == T_PATH:
                self.path = value
            else:
                self.status = (value[0] - 48) * 100 + (value[1] - 48) * 10 + value[2] - 48
        return 0


cdef class _Out:
    """Octets to write, and the table of our header blocks."""

    cdef unsigned char *p
    cdef Py_ssize_t size
    cdef Py_ssize_t room
    cdef list pieces  # (place in p, octets that go in there)
    cdef dict _pairs  # of the table: pair -> number, counted from the first that was ever added
    cdef dict _names
    cdef object _order  # pairs, the oldest first
    cdef long long _added
    cdef int _octets
    cdef int _most
    cdef int _least  # since the last block that was written
    cdef bint _resized

    def __cinit__(self):
        self.room = 256
        self.p = <unsigned char *>PyMem_Malloc(self.room)
        if self.p == NULL:
            raise MemoryError
        self.pieces = []
        self._pairs = {}
        self._names = {}
        self._order = deque()
        self._most = self._least = TABLE_OCTETS

    def __dealloc__(self):
        PyMem_Free(self.p)

    cdef int reserve(self, Py_ssize_t more) except -1:
        cdef Py_ssize_t room = self.room
        cdef unsigned char *p
        if self.size + more > room:
            while room < self.size + more:
                room *= 2
            p = <unsigned char *>PyMem_Realloc(self.p, room)
            if p == NULL:
                raise MemoryError
            self.p = p
            self.room = room
        return 0

    cdef list take(self):
        cdef list out = []
        cdef Py_ssize_t at = 0, place
        if self.size:
            for place, octets in self.pieces:
                out.append(PyBytes_FromStringAndSize(<char *>self.p + at, place - at))
                out.append(octets)
                at = place
            if at < self.size:
                out.append(PyBytes_FromStringAndSize(<char *>self.p + at, self.size - at))
            if self.pieces:
                self.pieces = []
            self.size = 0
            if self.room > 65536:
                # What a burst needed is not kept by a connection that idles.
                PyMem_Free(self.p)
                self.room = 256
                self.p = <unsigned char *>PyMem_Malloc(self.room)
                if self.p == NULL:
                    self.room = 0
                    raise MemoryError
        return out

    cdef int header(self, Py_ssize_t length, int kind, int flags, unsigned int stream_id) except -1:
        self.reserve(9)
        self._header_at(self.size, length, kind, flags, stream_id)
        self.size += 9
        return 0

    cdef void _header_at(self, Py_ssize_t at, Py_ssize_t length, int kind, int flags, unsigned int stream_id) noexcept:
        cdef unsigned char *p = self.p + at
        p[0] = (length >> 16) & 255
        p[1] = (length >> 8) & 255
        p[2] = length & 255
        p[3] = kind
        p[4] = flags
        self._long_at(at + 5, stream_id)

    cdef void _long_at(self, Py_ssize_t at, unsigned int value) noexcept:
        cdef unsigned char *p = self.p + at
        p[0] = value >> 24
        p[1] = (value >> 16) & 255
        p[2] = (value >> 8) & 255
        p[3] = value & 255

    cdef int put(self, const unsigned char *octets, Py_ssize_t n) except -1:
        self.reserve(n)
        memcpy(self.p + self.size, octets, n)
        self.size += n
        return 0

    cdef int put_long(self, unsigned int value) except -1:
        self.reserve(4)
        self._long_at(self.size, value)
        self.size += 4
        return 0

    cdef int put_setting(self, int setting, unsigned int value) except -1:
        self.reserve(6)
        self.p[self.size] = 0
        self.p[self.size + 1] = setting
        self.size += 2
        return self.put_long(value)

    cdef int frame_long(self, int kind, unsigned int stream_id, unsigned int value) except -1:
        self.header(4, kind, 0, stream_id)
        return self.put_long(value)

    # HPACK

    cdef void _integer(self, int bits, int first, unsigned long long value) noexcept:
        """Room is there."""
        cdef unsigned int most = (1 << bits) - 1
        if value < most:
            self.p[self.size] = first | <unsigned char>value
            self.size += 1
            return
        self.p[self.size] = first | most
        self.size += 1
        value -= most
        while value >= 128:
            self.p[self.size] = 128 | (value & 127)
            self.size += 1
            value >>= 7
        self.p[self.size] = <unsigned char>value
        self.size += 1

    cdef int _put_string(self, bytes octets) except -1:
        self.reserve(12 + PyBytes_GET_SIZE(octets))
        self._integer(7, 0, PyBytes_GET_SIZE(octets))
        memcpy(self.p + self.size, PyBytes_AS_STRING(octets), PyBytes_GET_SIZE(octets))
        self.size += PyBytes_GET_SIZE(octets)
        return 0

    cdef int resize(self, int most) except -1:
        """The most that the peer lets the table be."""
        if most != self._most:
            self._resized = True
            self._most = most
            self._least = min(self._least, most)
            self._shrink(most)
        return 0

    cdef int _shrink(self, int most) except -1:
        cdef tuple pair
        cdef bytes name
        cdef object number
        while self._octets > most:
            pair = self._order.popleft()
            name = pair[0]
            self._octets -= len(name) + len(pair[1]) + 32
            number = self._added - len(self._order) - 1
            if self._pairs.get(pair) == number:
                del self._pairs[pair]
            if self._names.get(name) == number:
                del self._names[name]
        return 0

    cdef bint knows(self, tuple pair):
        """It is in the table, so it was looked at."""
        return PyDict_GetItem(self._pairs, pair) != NULL

    cdef int field(self, tuple pair) except -1:
        cdef PyObject *found
        cdef bytes name = <bytes>PyTuple_GET_ITEM(pair, 0)
        cdef bytes value
        cdef int tag = 0, size
        cdef long long index
        self.reserve(16)
        found = PyDict_GetItem(_tags, name)
        if found != NULL:
            tag = <int><object>found
        index = tag >> W_NAME
        if not tag & (W_NEVER | W_PLAIN):
            found = PyDict_GetItem(self._pairs, pair)
            if found != NULL:
                self._integer(7, 0x80, STATIC_ENTRIES + self._added - <long long><object>found)
                return 0
            if index:
                found = PyDict_GetItem(_static_pairs, pair)
                if found != NULL:
                    self._integer(7, 0x80, <int><object>found)
                    return 0
        value = <bytes>PyTuple_GET_ITEM(pair, 1)
        if index == 0:
            found = PyDict_GetItem(self._names, name)
            if found != NULL:
                index = STATIC_ENTRIES + self._added - <long long><object>found
        if tag & W_NEVER:
            self._integer(4, 0x10, index)
        elif tag & W_PLAIN or PyBytes_GET_SIZE(name) + PyBytes_GET_SIZE(value) > 512 or self._most < 1024:
            self._integer(4, 0x00, index)
        else:
            self._integer(6, 0x40, index)
            tag = -1
        if index == 0:
            self._put_string(name)
        self._put_string(value)
        if tag == -1:
            size = <int>(PyBytes_GET_SIZE(name) + PyBytes_GET_SIZE(value) + 32)
            self._shrink(self._most - size)
            number = self._added
            self._pairs[pair] = number
            self._names[name] = number
            self._order.append(pair)
            self._added += 1
            self._octets += size
        return 0

    cdef Py_ssize_t begin_block(self) except -1:
        """Where the HEADERS frame begins."""
        cdef Py_ssize_t at = self.size
        self.reserve(32)
        self.size += 9
        if self._resized:
            if self._least < self._most:
                self._integer(5, 0x20, self._least)
            self._integer(5, 0x20, self._most)
            self._resized = False
            self._least = self._most
        return at

    cdef int end_block(self, Py_ssize_t at, unsigned int stream_id, int flags) except -1:
        cdef Py_ssize_t size = self.size - at - 9, taken
        cdef bytes block
        if size <= _DATA_FRAME:
            self._header_at(at, size, F_HEADERS, flags | END_HEADERS, stream_id)
            return 0
        block = PyBytes_FromStringAndSize(<char *>self.p + at + 9, size)
        self._header_at(at, _DATA_FRAME, F_HEADERS, flags, stream_id)
        self.size = at + 9 + _DATA_FRAME
        taken = _DATA_FRAME
        while taken < size:
            more = min(_DATA_FRAME, size - taken)
            self.header(more, F_CONTINUATION, END_HEADERS if taken + more == size else 0, stream_id)
            self.put(<const unsigned char *>PyBytes_AS_STRING(block) + taken, more)
            taken += more
        return 0


cdef dict _statuses = {}


cdef tuple _status_pair(int status):
    """At most 800 of them."""
    cdef PyObject *found = PyDict_GetItem(_statuses, status)
    if found == NULL:
        _statuses[status] = (b":status", b"%d" % status)
        return _statuses[status]
    return <tuple>found


cdef inline unsigned int _long(const unsigned char *p) noexcept:
    return (<unsigned int>p[0] << 24) | (<unsigned int>p[1] << 16) | (<unsigned int>p[2] << 8) | p[3]


# --- one connection

cdef bint _are_usual_trailers(object headers) except -1:
    """May these fields go as they are? If not, `h2_strict` decides."""
    cdef tuple pair
    if type(headers) is not list:
        return False
    for item in <list>headers:
        if type(item) is not tuple or PyTuple_GET_SIZE(item) != 2:
            return False
        pair = <tuple>item
        if type(<object>PyTuple_GET_ITEM(pair, 0)) is not bytes or type(<object>PyTuple_GET_ITEM(pair, 1)) is not bytes:
            return False
        if _kind(_tag(<bytes>PyTuple_GET_ITEM(pair, 0)), <bytes>PyTuple_GET_ITEM(pair, 1)) != T_PLAIN:
            return False
    return True


@cython.freelist(64)
cdef class _Stream:
    cdef unsigned int id
    cdef object number  # the same, as events have it
    cdef long long in_window
    cdef long long out_window
    cdef bint in_head
    cdef bint in_ended
    cdef bint out_head
    cdef bint out_ended
    cdef bint end_sent
    cdef bint connect
    cdef bint tunnel
    cdef bint request_ended
    cdef bint swallowed
    cdef bint head_method
    cdef bint no_content_out
    cdef bint blocked
    cdef long long length_in
    cdef long long length_out
    cdef long long unacked
    cdef long long pending
    cdef object queue  # what waits for windows: a deque; the first piece from `queue_at` on
    cdef Py_ssize_t queue_at
    cdef Py_ssize_t queued
    cdef list trailers
    cdef list held

    def __repr__(self):
        ended = f"in_ended={self.in_ended} out_ended={self.out_ended}"
        return f"<stream {self.id} {ended} windows={self.in_window}/{self.out_window} queued={self.queued}>"


cdef class _Connection(H2Engine):
    """What both sides share. Each method is that of the same name in `h2_reference`."""

    cdef bint _client
    cdef object _limits
    cdef _Decoder _decoder
    cdef _Out _out
    cdef bytearray _buf
    cdef bytes _preface_left
    cdef bint _settings_seen
    cdef int _settings_unacked
    cdef bint _dead
    cdef bint _closed
    cdef double _now
    cdef dict _streams
    cdef dict _owed
    cdef unsigned int _highest
    cdef unsigned int _next_id
    cdef dict _reset_by_us
    cdef dict _blocked
    cdef list _resumable
    cdef bint _may_pump
    cdef long long _in_window
    cdef long long _pending
    cdef long long _out_window
    cdef long long _peer_window
    cdef object _peer_max_streams
    cdef bint _peer_connect
    cdef object _pings
    cdef bint _draining
    cdef unsigned int _last_accepted
    cdef unsigned int _peer_goaway
    cdef double _glitches
    cdef double _glitches_now
    cdef double _resets
    cdef double _resets_now
    cdef double _max_glitches
    cdef double _glitches_per_s
    cdef double _max_resets
    cdef double _resets_per_s
    cdef unsigned int _block_stream
    cdef int _block_flags
    cdef bytearray _block
    cdef int _block_frames
    cdef list _events
    cdef long long _stream_window
    cdef long long _connection_window
    cdef Py_ssize_t _max_frame
    cdef Py_ssize_t _max_queued
    cdef long long _max_list
    cdef int _max_headers
    cdef Py_ssize_t _max_streams
    cdef Py_ssize_t _max_block
    cdef int _max_block_frames
    cdef bint _connect_protocol
    # The last frame of `_tail`, if nothing is written behind it: where its flags are.
    cdef _Stream _tail
    cdef Py_ssize_t _tail_flags
    cdef tuple _host

    def __init__(self, limits=None):
        if limits is None:
            limits = H2Limits()
        self._limits = limits
        self._stream_window = limits.stream_window
        self._connection_window = limits.connection_window
        self._max_frame = limits.max_frame_bytes
        self._max_queued = limits.max_queued_bytes
        self._max_list = limits.max_header_list_bytes
        self._max_headers = limits.max_headers
        self._max_streams = limits.max_streams
        self._max_block = limits.max_block_bytes
        self._max_block_frames = limits.max_block_frames
        self._connect_protocol = limits.connect_protocol
        self._max_glitches = self._glitches = limits.glitches
        self._glitches_per_s = limits.glitches_per_s
        self._max_resets = self._resets = limits.resets
        self._resets_per_s = limits.resets_per_s
        self._decoder = _Decoder()
        self._out = _Out()
        self._buf = bytearray()
        self._block = bytearray()
        self._preface_left = _EMPTY if self._client else _PREFACE
        self._settings_unacked = 1
        self._streams = {}
        self._owed = {}
        self._reset_by_us = {}
        self._blocked = {}
        self._resumable = []
        self._events = []
        self._pings = deque()
        self._next_id = 1
        self._in_window = self._connection_window
        self._out_window = 65535
        self._peer_window = 65535
        self._peer_max_streams = _ASSUMED_MAX_STREAMS
        self._last_accepted = _MAX_ID
        self._peer_goaway = _MAX_ID + 1
        self._greet()

    cdef int _greet(self) except -1:
        cdef _Out out = self._out
        cdef Py_ssize_t at
        if self._client:
            out.put(<const unsigned char *>PyBytes_AS_STRING(_PREFACE), PyBytes_GET_SIZE(_PREFACE))
        at = out.size
        out.header(0, F_SETTINGS, 0, 0)
        out.put_setting(1, TABLE_OCTETS)
        out.put_setting(2, 0)
        out.put_setting(4, <unsigned int>self._stream_window)
        out.put_setting(5, <unsigned int>self._max_frame)
        out.put_setting(8, 1 if self._connect_protocol and not self._client else 0)
        out.put_setting(6, <unsigned int>self._max_list)
        if not self._client:
            out.put_setting(3, <unsigned int>self._max_streams)
        out._header_at(at, out.size - at - 9, F_SETTINGS, 0, 0)
        if self._connection_window > 65535:
            out.frame_long(F_WINDOW_UPDATE, 0, <unsigned int>(self._connection_window - 65535))
        return 0

    def __repr__(self):
        return (
            f"<{type(self).__name__} {list(self._streams.values())} windows={self._in_window}/{self._out_window} "
            f"draining={self._draining} dead={self._dead}>"
        )

    # --- what the driver asks

    @property
    def open_streams(self):
        return len(self._streams)

    @property
    def buffered(self):
        return self.held()

    cpdef Py_ssize_t held(self) except -1:
        return len(self._buf) + len(self._block)

    cdef bint _is_draining(self) noexcept:
        return self._draining or self._peer_goaway <= _MAX_ID

    @property
    def is_draining(self):
        return self._is_draining()

    @property
    def must_close(self):
        return self.is_last()

    cpdef bint is_last(self) except -1:
        if self._dead or self._closed:
            return True
        drained = self._peer_goaway <= _MAX_ID or (self._draining and self._last_accepted < _MAX_ID)
        return drained and not self._streams

    @property
    def settings_acked(self):
        return not self._settings_unacked

    @property
    def stalled_streams(self):
        return list(self._blocked)

    cpdef bint is_blocked(self, stream_id) except -1:
        return stream_id in self._blocked

    cpdef Py_ssize_t queued(self, stream_id) except -1:
        cdef _Stream stream = self._streams.get(stream_id)
        return stream.queued if stream is not None else 0

    def statistics(self):
        cdef _Stream stream
        queued = 0
        owed = sum(self._owed.values())
        for stream in self._streams.values():
            queued += stream.queued
            owed += stream.unacked
        return {
            "streams": len(self._streams),
            "blocked": len(self._blocked),
            "queued": queued,
            "owed": owed,
            "in_window": self._in_window,
            "out_window": self._out_window,
            "glitches_left": max(0, int(self._glitches)),
            "resets_left": max(0, int(self._resets)),
            "buffered": len(self._buf) + len(self._block),
        }

    # --- out

    cpdef list take_output(self):
        self._tail = None
        return self._out.take()

    cdef int _finish(self, _Stream stream) except -1:
        if self._tail is stream:
            self._out.p[self._tail_flags] |= END_STREAM
        else:
            self._out.header(0, F_DATA, END_STREAM, stream.id)
        self._tail = None
        return self._finished(stream)

    cdef int _finished(self, _Stream stream) except -1:
        stream.out_ended = True
        if stream.in_ended:
            self._close(stream)
        elif not self._client and not stream.tunnel:
            self._write_rst(stream.id, NO_ERROR)
            self._remember(stream.number)
            self._close(stream)
        return 0

    cdef int _write_rst(self, unsigned int stream_id, unsigned int code) except -1:
        self._tail = None
        return self._out.frame_long(F_RST_STREAM, stream_id, code)

    cdef int _write_window(self, unsigned int stream_id, long long n) except -1:
        self._tail = None
        return self._out.frame_long(F_WINDOW_UPDATE, stream_id, <unsigned int>n)

    cdef int _write_fields(self, _Stream stream, list fields, int flags, bint tail) except -1:
        cdef Py_ssize_t at = self._out.begin_block()
        cdef tuple pair
        for pair in fields:
            self._out.field(pair)
        self._out.end_block(at, stream.id, flags)
        self._tail = stream if tail else None
        self._tail_flags = at + 4
        return 0

    cpdef send(self, stream_id, event):
        """LocalProtocolError changes nothing: the stream can still be reset. On streams that are over, it does nothing."""
        cdef _Stream stream
        cdef PyObject *found
        if self._dead:
            raise LocalProtocolError("send on a broken connection")
        kind = type(event)
        if kind is RequestHead:
            self._send_request(stream_id, event)
            return ()
        found = PyDict_GetItem(self._streams, stream_id)
        if found == NULL:
            if not self._was_stream(stream_id):
                raise LocalProtocolError(f"there is no stream {stream_id}")
            return ()
        stream = <_Stream>found
        if stream.end_sent:
            raise LocalProtocolError("send behind the end of the message")
        if kind is Data:
            self._send_data(stream, (<Data>event).data)
        elif kind is End:
            self._send_end(stream)
        elif kind is ResponseHead:
            self._send_response(stream, event)
        elif kind is Trailers:
            self._send_trailers(stream, (<Trailers>event).headers)
        elif kind is Informational:
            self._send_informational(stream, event)
        else:
            raise LocalProtocolError(f"nobody sends {kind.__name__}")
        return ()

    cdef bint _was_stream(self, long long stream_id) noexcept:
        return stream_id % 2 == 1 and 0 < stream_id < (self._next_id if self._client else <long long>self._highest + 1)

    cdef _Stream _new_stream(self, object number, unsigned int stream_id):
        cdef _Stream stream = _Stream.__new__(_Stream)
        stream.id = stream_id
        stream.number = number
        stream.in_window = self._stream_window
        stream.out_window = self._peer_window
        stream.length_in = stream.length_out = -1
        self._streams[number] = stream
        return stream

    cdef bint _usual(self, object headers, long long *length, bint request) except -1:
        """Do these fields go as they are (Host apart, which is left in `_host`)? If not, `h2_strict` decides."""
        cdef bytes name
        cdef int tag, kind
        cdef tuple pair
        length[0] = -1
        self._host = None
        if type(headers) is not list:
            return False
        for item in <list>headers:
            if type(item) is not tuple:
                return False
            pair = <tuple>item
            if PyTuple_GET_SIZE(pair) != 2:
                return False
            if type(<object>PyTuple_GET_ITEM(pair, 0)) is not bytes or type(<object>PyTuple_GET_ITEM(pair, 1)) is not bytes:
                return False
            name = <bytes>PyTuple_GET_ITEM(pair, 0)
            tag = _tag(name)
            if not tag & (W_PLAIN | W_NEVER) and self._out.knows(pair) and name[0] != 0x3A:
                continue
            kind = _kind(tag, <bytes>PyTuple_GET_ITEM(pair, 1))
            if kind == T_LENGTH:
                if length[0] >= 0:
                    return False
                length[0] = _number(<bytes>PyTuple_GET_ITEM(pair, 1))
            elif kind == T_HOST:
                if not request or self._host is not None:
                    return False
                self._host = pair
            elif kind == T_ODD or kind > T_HOST:
                return False
        return True

    cdef int _send_request(self, object number, RequestHead event) except -1:
        cdef _Stream stream
        cdef long long length
        cdef tuple host
        cdef tuple pair
        cdef bytes method, target, scheme, protocol
        cdef Py_ssize_t at
        cdef list fields = None
        if not self._client:
            raise LocalProtocolError("a server does not send RequestHead")
        if number != self._next_id:
            raise LocalProtocolError(f"the next stream is {self._next_id}")
        if not self._may_open():
            raise LocalProtocolError("the connection takes no more streams")
        method = event.method
        target = event.target
        headers = event.headers
        scheme = event.scheme or _HTTP
        protocol = event.protocol
        if PyBytes_GET_SIZE(protocol) and not self._peer_connect:
            raise LocalProtocolError("the server does not know extended CONNECT")
        if (
            PyBytes_GET_SIZE(protocol)
            or not self._usual(headers, &length, True)
            or self._host is None
            or _kind(T_METHOD, method) == T_ODD
            or _kind(T_PATH, target) == T_ODD
            or _kind(T_SCHEME, scheme) == T_ODD
        ):
            fields, length = request_fields(event)
        stream = self._new_stream(number, self._next_id)
        self._next_id += 2
        stream.out_head = True
        stream.length_out = length
        stream.connect = method == _CONNECT
        stream.head_method = method == _HEAD
        if fields is not None:
            return self._write_fields(stream, fields, 0, True)
        at = self._out.begin_block()
        self._out.field((b":method", method))
        self._out.field((b":scheme", scheme))
        host = self._host
        self._out.field((b":authority", host[1]))
        self._out.field((b":path", target))
        for pair in <list>headers:
            if pair is not host:
                self._out.field(pair)
        self._out.end_block(at, stream.id, 0)
        self._tail = stream
        self._tail_flags = at + 4
        return 0

    cdef Py_ssize_t _most_streams(self) except -1:
        return self._max_streams if self._peer_max_streams > self._max_streams else self._peer_max_streams

    cdef bint _may_open(self) except -1:
        return (
            not self._is_draining()
            and not self._dead
            and not self._closed
            and len(self._streams) < self._most_streams()
            and self._next_id <= _MAX_ID
        )

    cdef int _send_response(self, _Stream stream, ResponseHead event) except -1:
        cdef long long length
        cdef int status
        cdef list fields = None
        cdef Py_ssize_t at
        cdef tuple pair
        status = event.status
        headers = event.headers
        if self._client or stream.out_head or status < 200:
            raise LocalProtocolError("no ResponseHead is due")
        if status > 999 or not self._usual(headers, &length, False):
            fields, length = response_fields(status, headers)
        stream.out_head = True
        stream.no_content_out = stream.head_method or status == 204 or status == 304
        stream.length_out = -1 if stream.no_content_out else length
        if stream.connect:
            if status < 300:
                stream.tunnel = True
                stream.length_out = -1
                if fields is None:
                    fields, _ = response_fields(status, headers)
                fields = [field for field in fields if field[0] != b"content-length"]
                if stream.held:
                    self._resumable.append(stream)
            else:
                self._drop_held(stream)
        if fields is not None:
            return self._write_fields(stream, fields, 0, True)
        at = self._out.begin_block()
        self._out.field(_status_pair(status))
        for pair in <list>headers:
            self._out.field(pair)
        self._out.end_block(at, stream.id, 0)
        self._tail = stream
        self._tail_flags = at + 4
        return 0

    cdef int _drop_held(self, _Stream stream) except -1:
        stream.swallowed = True
        stream.held = None
        self._credit_connection(stream.unacked)
        stream.unacked = 0
        return 0

    cdef int _send_informational(self, _Stream stream, Informational event) except -1:
        if self._client or stream.out_head or not 100 <= event.status < 200:
            raise LocalProtocolError("no Informational is due")
        fields, _ = response_fields(event.status, event.headers)
        return self._write_fields(stream, fields, 0, False)

    cdef int _check_content(self, _Stream stream) except -1:
        if not stream.out_head:
            raise LocalProtocolError("content before the head")
        if self._client and stream.connect and not stream.tunnel:
            raise LocalProtocolError("content before the tunnel")
        if stream.trailers is not None:
            raise LocalProtocolError("content behind trailers")
        return 0

    cdef int _send_data(self, _Stream stream, object content) except -1:
        cdef bytes data
        cdef Py_ssize_t size, at, left
        self._check_content(stream)
        data = content if type(content) is bytes else bytes(content)
        left = PyBytes_GET_SIZE(data)
        if stream.no_content_out or not left:
            return 0
        if 0 <= stream.length_out < left:
            raise LocalProtocolError(Rule.CONTENT.detail)
        if stream.blocked and stream.queued + left > self._max_queued:
            raise LocalProtocolError("content beyond what may be queued for a blocked stream")
        if stream.length_out >= 0:
            stream.length_out -= left
        at = 0
        if not stream.blocked:
            while left:
                size = self._frame_size(stream, left)
                if size <= 0:
                    break
                self._write_data(stream, data, at, size)
                at += size
                left -= size
            if not left:
                return 0
            stream.blocked = True
            stream.queue_at = at
            self._blocked[stream.number] = stream
        if stream.queue is None:
            stream.queue = deque()
        stream.queue.append(data)
        stream.queued += left
        return 0

    cdef inline Py_ssize_t _frame_size(self, _Stream stream, Py_ssize_t size) noexcept:
        if size > _DATA_FRAME:
            size = _DATA_FRAME
        if size > stream.out_window:
            size = <Py_ssize_t>stream.out_window
        if size > self._out_window:
            size = <Py_ssize_t>self._out_window
        return size

    cdef int _write_data(self, _Stream stream, bytes data, Py_ssize_t at, Py_ssize_t size) except -1:
        cdef _Out out = self._out
        self._tail = stream
        self._tail_flags = out.size + 4
        out.header(size, F_DATA, 0, stream.id)
        if size >= _ZERO_COPY and at == 0 and size == PyBytes_GET_SIZE(data):
            out.pieces.append((out.size, data))
        else:
            out.put(<const unsigned char *>PyBytes_AS_STRING(data) + at, size)
        stream.out_window -= size
        self._out_window -= size
        self._earn_glitches(<double>(_CONTENT_EARNS + size // _OCTETS_PER_GLITCH))
        return 0

    cdef bint _write_frame(self, _Stream stream) except -1:
        cdef bytes data = stream.queue[0]
        cdef Py_ssize_t at = stream.queue_at
        cdef Py_ssize_t size = self._frame_size(stream, PyBytes_GET_SIZE(data) - at)
        if size <= 0:
            return False
        if at + size == PyBytes_GET_SIZE(data):
            stream.queue.popleft()
            stream.queue_at = 0
        else:
            stream.queue_at = at + size
        stream.queued -= size
        self._write_data(stream, data, at, size)
        return True

    cdef int _send_trailers(self, _Stream stream, object headers) except -1:
        self._check_content(stream)
        if stream.tunnel:
            raise LocalProtocolError(Rule.TUNNEL_FRAME.detail)
        if stream.length_out > 0:
            raise LocalProtocolError(Rule.CONTENT.detail)
        fields = list(headers) if _are_usual_trailers(headers) else trailer_fields(headers)
        if not stream.no_content_out and fields:
            stream.trailers = fields
        return 0

    cdef int _send_end(self, _Stream stream) except -1:
        if self._client and stream.connect and not stream.tunnel:
            if stream.request_ended:
                raise LocalProtocolError("send behind the end of the message")
            stream.request_ended = True
            if not stream.in_head:
                return 0
        elif not stream.out_head:
            raise LocalProtocolError("the end before the head")
        if stream.length_out > 0:
            raise LocalProtocolError(Rule.CONTENT.detail)
        stream.end_sent = True
        if not stream.queued:
            self._write_end(stream)
        return 0

    cdef int _write_end(self, _Stream stream) except -1:
        if stream.trailers is not None:
            self._write_fields(stream, stream.trailers, END_STREAM, False)
            return self._finished(stream)
        return self._finish(stream)

    cdef int _pump(self) except -1:
        cdef bint moved = True
        cdef _Stream stream
        self._may_pump = False
        while moved and self._out_window > 0 and self._blocked:
            moved = False
            for stream in list(self._blocked.values()):
                if not self._write_frame(stream):
                    continue
                moved = True
                if not stream.queued:
                    del self._blocked[stream.number]
                    stream.blocked = False
                    self._events.append(Writable(stream.number))
                    if stream.end_sent:
                        self._write_end(stream)
        return 0

    cpdef credit(self, stream_id, n):
        """Octets of Data that were handed out have gone on. Too many are counted as those that there are."""
        cdef _Stream stream
        cdef long long octets = n, owed
        cdef PyObject *found
        if self._dead or octets <= 0:
            return ()
        found = PyDict_GetItem(self._streams, stream_id)
        if found != NULL:
            stream = <_Stream>found
            if octets > stream.unacked:
                octets = stream.unacked
            stream.unacked -= octets
            self._credit_stream(stream, octets)
            self._credit_connection(octets)
        else:
            found = PyDict_GetItem(self._owed, stream_id)
            if found != NULL:
                owed = <long long><object>found
                if octets >= owed:
                    octets = owed
                    del self._owed[stream_id]
                else:
                    self._owed[stream_id] = owed - octets
                self._credit_connection(octets)
        return ()

    cdef int _credit_stream(self, _Stream stream, long long n) except -1:
        stream.pending += n
        if stream.pending * 2 >= self._stream_window and not stream.in_ended:
            stream.in_window += stream.pending
            self._write_window(stream.id, stream.pending)
            stream.pending = 0
        return 0

    cdef int _credit_connection(self, long long n) except -1:
        self._pending += n
        if self._pending * 2 >= self._connection_window and not self._dead:
            self._in_window += self._pending
            self._write_window(0, self._pending)
            self._pending = 0
        return 0

    def reset(self, stream_id, reason, code=CANCEL):
        cdef _Stream stream
        if self._dead:
            return ()
        stream = self._streams.get(stream_id)
        if stream is not None:
            self._reset_stream(stream, code)
        else:
            self._credit_connection(self._owed.pop(stream_id, 0))
        return ()

    cdef int _reset_stream(self, _Stream stream, unsigned int code) except -1:
        self._write_rst(stream.id, code)
        self._remember(stream.number)
        return self._give_up(stream)

    cdef int _remember(self, object number) except -1:
        self._reset_by_us[number] = None
        if len(self._reset_by_us) > _MAX_REMEMBERED:
            del self._reset_by_us[next(iter(self._reset_by_us))]
        return 0

    cdef int _close(self, _Stream stream) except -1:
        del self._streams[stream.number]
        if stream.blocked:
            self._blocked.pop(stream.number, None)
        if stream.unacked:
            self._owed[stream.number] = stream.unacked
        self._earn_glitches(_EXCHANGE_EARNS)
        self._resets = min(self._max_resets, self._resets + 1)
        return 0

    cdef int _give_up(self, _Stream stream) except -1:
        del self._streams[stream.number]
        if stream.blocked:
            self._blocked.pop(stream.number, None)
        stream.swallowed = True
        stream.held = None
        return self._credit_connection(stream.unacked)

    def goaway(self):
        if self._dead:
            return ()
        if self._client:
            if not self._draining:
                self._write_goaway(0, NO_ERROR, _EMPTY)
        elif not self._draining:
            self._write_goaway(_MAX_ID, NO_ERROR, _EMPTY)
            self._write_ping(_DRAIN_PING, 0)
        elif self._last_accepted == _MAX_ID:
            self._write_goaway(self._highest, NO_ERROR, _EMPTY)
        self._draining = True
        return ()

    cdef int _write_goaway(self, unsigned int last, unsigned int code, bytes detail) except -1:
        self._last_accepted = last
        self._tail = None
        self._out.header(8 + len(detail), F_GOAWAY, 0, 0)
        self._out.put_long(last)
        self._out.put_long(code)
        return self._out.put(<const unsigned char *>PyBytes_AS_STRING(detail), PyBytes_GET_SIZE(detail))

    cdef int _write_ping(self, bytes data, int flags) except -1:
        self._tail = None
        self._out.header(8, F_PING, flags, 0)
        return self._out.put(<const unsigned char *>PyBytes_AS_STRING(data), 8)

    def ping(self, bytes data):
        if self._dead:
            raise LocalProtocolError("ping on a broken connection")
        if len(data) != 8 or data == _DRAIN_PING or len(self._pings) >= _MAX_PINGS:
            raise LocalProtocolError("a ping has eight octets, and only some may be without answer")
        self._pings.append(data)
        self._write_ping(data, 0)
        return ()

    # --- in

    cpdef list receive(self, bytes data, double now=0.0):
        cdef Py_ssize_t taken
        cdef list events
        if self._dead or self._closed:
            return []
        self._now = now
        self._tail = None
        if PyBytes_GET_SIZE(data) == 0:
            return self._receive_eof()
        self._events = events = []
        if PyByteArray_GET_SIZE(self._buf):
            self._buf += data
            taken = self._read(
                <const unsigned char *>PyByteArray_AS_STRING(self._buf), PyByteArray_GET_SIZE(self._buf)
            )
            if taken:
                del self._buf[:taken]
        else:
            taken = self._read(<const unsigned char *>PyBytes_AS_STRING(data), PyBytes_GET_SIZE(data))
            if taken < PyBytes_GET_SIZE(data):
                self._buf += data[taken:]
        if self._may_pump:
            self._pump()
        self._events = []
        return events

    cdef list _receive_eof(self):
        cdef _Stream stream
        cdef list events = []
        self._closed = True
        for stream in self._streams.values():
            events.append(Reset(stream.number, "the peer closed the connection", CANCEL))
        self._streams.clear()
        self._blocked.clear()
        events.append(ConnectionClosed())
        return events

    cdef int _fail(self, object rule) except -1:
        self._write_goaway(0 if self._client else self._highest, int(rule.code), rule.detail.encode())
        self._dead = True
        self._streams.clear()
        self._blocked.clear()
        # Not emptied in place: it is being read.
        self._buf = bytearray()
        self._block = bytearray()
        raise RemoteProtocolError(rule.detail)

    cdef inline void _earn_glitches(self, double tokens) noexcept:
        self._glitches += tokens
        if self._glitches > self._max_glitches:
            self._glitches = self._max_glitches

    cdef int _glitch(self) except -1:
        if self._now > self._glitches_now:
            if self._glitches_now:
                self._earn_glitches((self._now - self._glitches_now) * self._glitches_per_s)
            self._glitches_now = self._now
        self._glitches -= 1
        if self._glitches < 0:
            self._fail(Rule.GLITCHES)
        return 0

    cdef int _charge_reset(self) except -1:
        if self._client:
            return self._glitch()
        if self._now > self._resets_now:
            if self._resets_now:
                self._resets = min(self._max_resets, self._resets + (self._now - self._resets_now) * self._resets_per_s)
            self._resets_now = self._now
        self._resets -= 1
        if self._resets < 0:
            self._fail(Rule.RESETS)
        return 0

    cdef int _stream_error(self, _Stream stream, object rule) except -1:
        self._reset_stream(stream, int(rule.code))
        self._events.append(Reset(stream.number, rule.detail, rule.code, ours=True))
        return self._charge_reset()

    cdef Py_ssize_t _read(self, const unsigned char *p, Py_ssize_t size) except -1:
        """How many octets were read: whole frames."""
        cdef Py_ssize_t at = 0, length
        cdef unsigned int stream_id
        cdef int kind, flags
        if self._preface_left:
            at = min(size, len(self._preface_left))
            if PyBytes_FromStringAndSize(<const char *>p, at) != self._preface_left[:at]:
                self._fail(Rule.PREFACE)
            self._preface_left = self._preface_left[at:]
        while size - at >= 9:
            length = (<Py_ssize_t>p[at] << 16) | (<Py_ssize_t>p[at + 1] << 8) | p[at + 2]
            kind = p[at + 3]
            flags = p[at + 4]
            stream_id = _long(p + at + 5) & _MAX_ID
            self._check_header(kind, flags, stream_id, length)
            if size - at < 9 + length:
                break
            self._read_frame(kind, flags, stream_id, p + at + 9, length)
            at += 9 + length
        return at

    cdef int _check_header(self, int kind, int flags, unsigned int stream_id, Py_ssize_t length) except -1:
        if length > self._max_frame:
            self._fail(Rule.FRAME_SIZE)
        if not self._settings_seen and (kind != F_SETTINGS or flags & ACK):
            self._fail(Rule.NO_SETTINGS)
        if self._block_stream:
            if kind != F_CONTINUATION or stream_id != self._block_stream:
                self._fail(Rule.INTERLEAVED)
        elif kind == F_CONTINUATION:
            self._fail(Rule.INTERLEAVED)
        if kind == F_DATA or kind == F_HEADERS:
            if stream_id == 0:
                self._fail(Rule.STREAM_ZERO)
        elif kind == F_PRIORITY:
            if stream_id == 0:
                self._fail(Rule.STREAM_ZERO)
            if length != 5:
                self._fail(Rule.FRAME_SIZE)
        elif kind == F_RST_STREAM:
            if stream_id == 0:
                self._fail(Rule.STREAM_ZERO)
            if length != 4:
                self._fail(Rule.FRAME_SIZE)
        elif kind == F_SETTINGS:
            if stream_id:
                self._fail(Rule.STREAM_ZERO)
            if length % 6 or (flags & ACK and length):
                self._fail(Rule.FRAME_SIZE)
        elif kind == F_PUSH_PROMISE:
            self._fail(Rule.PUSH)
        elif kind == F_PING:
            if stream_id:
                self._fail(Rule.STREAM_ZERO)
            if length != 8:
                self._fail(Rule.FRAME_SIZE)
        elif kind == F_GOAWAY:
            if stream_id:
                self._fail(Rule.STREAM_ZERO)
            if length < 8:
                self._fail(Rule.FRAME_SIZE)
        elif kind == F_WINDOW_UPDATE:
            if length != 4:
                self._fail(Rule.FRAME_SIZE)
        return 0

    cdef int _read_frame(
        self, int kind, int flags, unsigned int stream_id, const unsigned char *p, Py_ssize_t size
    ) except -1:
        if kind == F_DATA:
            return self._read_data(flags, stream_id, p, size)
        if kind == F_HEADERS:
            return self._read_headers(flags, stream_id, p, size)
        if kind == F_WINDOW_UPDATE:
            return self._read_window_update(stream_id, p)
        if kind == F_CONTINUATION:
            return self._add_to_block(flags, p, size, True)
        if kind == F_PRIORITY:
            self._check_priority(stream_id, p)
            return self._glitch()
        if kind == F_RST_STREAM:
            return self._read_rst(stream_id, p)
        if kind == F_SETTINGS:
            return self._read_settings(flags, p, size)
        if kind == F_PING:
            return self._read_ping(flags, p)
        if kind == F_GOAWAY:
            return self._read_goaway(p, size)
        return self._glitch()

    cdef _Stream _find(self, object number):
        cdef PyObject *found = PyDict_GetItem(self._streams, number)
        return None if found == NULL else <_Stream>found

    cdef int _check_closed(self, unsigned int stream_id) except -1:
        if self._was_stream(stream_id):
            return 0
        if not self._client and stream_id % 2 and stream_id > self._last_accepted:
            return 0
        return self._fail(Rule.IDLE)

    cdef int _answer_closed(self, unsigned int stream_id) except -1:
        self._glitch()
        if stream_id not in self._reset_by_us and stream_id <= self._last_accepted:
            self._write_rst(stream_id, STREAM_CLOSED)
        return 0

    # DATA

    cdef int _read_data(self, int flags, unsigned int stream_id, const unsigned char *p, Py_ssize_t size) except -1:
        cdef Py_ssize_t length = size
        cdef _Stream stream
        cdef bint ends = flags & END_STREAM
        cdef object rule
        if flags & PADDED:
            if size == 0 or p[0] >= size:
                self._fail(Rule.PADDING)
            length = size - 1 - p[0]
            p += 1
        stream = self._find(stream_id)
        if stream is None:
            self._check_closed(stream_id)
        if size > self._in_window or (stream is not None and not stream.in_ended and size > stream.in_window):
            self._fail(Rule.WINDOW_EXCEEDED)
        self._in_window -= size
        if stream is None:
            self._credit_connection(size)
            return self._answer_closed(stream_id)
        rule = None
        if stream.in_ended:
            rule = Rule.STREAM_CLOSED
        elif not stream.in_head:
            rule = Rule.NO_HEAD
        elif stream.length_in >= 0 and (length > stream.length_in or (ends and length != stream.length_in)):
            rule = Rule.NO_CONTENT if self._client and stream.head_method else Rule.CONTENT
        if rule is not None:
            self._credit_connection(size)
            return self._stream_error(stream, rule)
        stream.in_window -= size
        if stream.length_in >= 0:
            stream.length_in -= length
        if length:
            self._earn_glitches(<double>(_CONTENT_EARNS + length // _OCTETS_PER_GLITCH))
        elif not ends:
            self._glitch()
        if stream.swallowed:
            self._credit_connection(size)
        else:
            if size > length:
                self._credit_connection(size - length)
                if not ends:
                    self._credit_stream(stream, size - length)
            if length:
                stream.unacked += length
                self._hand_out(
                    stream, content(stream.id, PyBytes_FromStringAndSize(<const char *>p, length))
                )
        if ends:
            self._end_in(stream)
        return 0

    cdef int _hand_out(self, _Stream stream, object event) except -1:
        if stream.connect and not self._client and not stream.tunnel:
            if stream.held is None:
                stream.held = []
            stream.held.append(event)
        else:
            self._events.append(event)
        return 0

    cdef int _end_in(self, _Stream stream) except -1:
        stream.in_ended = True
        if not stream.swallowed:
            self._hand_out(stream, end(stream.id))
        if stream.out_ended:
            self._close(stream)
        return 0

    # HEADERS and CONTINUATION

    cdef int _read_headers(self, int flags, unsigned int stream_id, const unsigned char *p, Py_ssize_t size) except -1:
        cdef Py_ssize_t start = 0, end = size
        if flags & PADDED:
            if size == 0 or p[0] >= size:
                self._fail(Rule.PADDING)
            start = 1
            end = size - p[0]
        if flags & PRIORITY:
            if end - start < 5:
                self._fail(Rule.FRAME_SIZE)
            self._check_priority(stream_id, p + start)
            start += 5
        if stream_id % 2 == 0:
            self._fail(Rule.STREAM_ID)
        if flags & END_HEADERS:
            if end - start > self._max_block:
                self._fail(Rule.BLOCK_SIZE)
            return self._read_block(stream_id, p + start, end - start, flags & END_STREAM)
        self._block_stream = stream_id
        self._block_flags = flags
        self._block_frames = 0
        return self._add_to_block(flags, p + start, end - start, False)

    cdef int _check_priority(self, unsigned int stream_id, const unsigned char *p) except -1:
        if _long(p) & _MAX_ID == stream_id:
            self._fail(Rule.DEPENDS_ON_ITSELF)
        return 0

    cdef int _add_to_block(self, int flags, const unsigned char *p, Py_ssize_t size, bint continued) except -1:
        cdef bytearray block
        cdef unsigned int stream_id
        self._block_frames += 1
        if self._block_frames > self._max_block_frames:
            self._fail(Rule.BLOCK_FRAMES)
        if len(self._block) + size > self._max_block:
            self._fail(Rule.BLOCK_SIZE)
        if continued and not size:
            self._glitch()
        self._block += PyBytes_FromStringAndSize(<const char *>p, size)
        if flags & END_HEADERS:
            stream_id = self._block_stream
            block = self._block
            self._block_stream = 0
            self._block = bytearray()
            self._read_block(
                stream_id,
                <const unsigned char *>PyByteArray_AS_STRING(block),
                PyByteArray_GET_SIZE(block),
                self._block_flags & END_STREAM,
            )
        return 0

    cdef int _read_block(self, unsigned int stream_id, const unsigned char *p, Py_ssize_t size, bint ends) except -1:
        cdef object rule
        cdef _Stream stream
        cdef object number = stream_id
        if self._client and stream_id >= self._next_id:
            self._fail(Rule.IDLE)
        rule = self._decoder.decode(p, size, self._max_list, self._max_headers)
        if rule is not None:
            self._fail(rule)
        stream = self._find(number)
        if stream is not None:
            if stream.in_ended:
                return self._stream_error(stream, Rule.STREAM_CLOSED)
            if self._client and not stream.in_head:
                rule = self._read_response(stream, ends)
            else:
                rule = self._read_trailers(stream, ends)
            if rule is not None:
                self._stream_error(stream, rule)
        elif self._client or stream_id <= self._highest or stream_id > self._last_accepted:
            self._answer_closed(stream_id)
        else:
            self._highest = stream_id
            rule = self._read_request(number, stream_id, ends)
            if rule is not None:
                self._refuse(number, stream_id, rule)
        return 0

    cdef int _refuse(self, object number, unsigned int stream_id, object rule) except -1:
        self._write_rst(stream_id, int(rule.code))
        self._remember(number)
        self._events.append(Reset(number, rule.detail, rule.code, ours=True))
        return self._charge_reset()

    cdef object _read_request(self, object number, unsigned int stream_id, bint ends):
        """The rule that it breaks, or None."""
        cdef _Decoder found = self._decoder
        cdef _Stream stream
        cdef long long length
        cdef object head
        cdef list headers
        cdef bytes method
        if len(self._streams) >= self._max_streams:
            return Rule.TOO_MANY
        if found.found.too_large:
            stream = self._new_stream(number, stream_id)
            stream.in_head = stream.swallowed = True
            self._events.append(RequestRefused(number, 431, Rule.LIST_SIZE.detail))
            stream.in_ended = ends
            self._charge_reset()
            return None
        if found.found.odd or found.found.seen != (
            1 << T_METHOD | 1 << T_SCHEME | 1 << T_AUTHORITY | 1 << T_PATH
        ):
            try:
                head, length = read_request(number, found.fields, connect_protocol=self._connect_protocol)
            except MalformedError as exc:
                return exc.rule
            method = head.method
        else:
            headers = PyList_GetSlice(found.fields, 3, len(found.fields))
            headers[0] = (_HOST, found.authority)
            method = found.method
            length = found.length
            head = request_head(stream_id, method, found.path, headers, _V2, None, found.scheme, _EMPTY)
        if ends and length > 0:
            return Rule.CONTENT
        stream = self._new_stream(number, stream_id)
        stream.in_head = True
        stream.length_in = length
        stream.head_method = method == _HEAD
        self._events.append(head)
        if method == _CONNECT:
            stream.connect = True
            self._events.append(end(stream_id))
        if ends:
            self._end_in(stream)
        return None

    cdef object _read_response(self, _Stream stream, bint ends):
        cdef _Decoder found = self._decoder
        cdef long long length
        cdef int status
        cdef list headers
        cdef bint granted
        if found.found.too_large:
            return Rule.LIST_SIZE
        if found.found.odd or found.found.seen != 1 << T_STATUS:
            try:
                status, headers, length = read_response(found.fields)
            except MalformedError as exc:
                return exc.rule
        else:
            headers = PyList_GetSlice(found.fields, 1, len(found.fields))
            status = found.status
            length = found.length
        if status < 200:
            if ends or status == 101:
                return Rule.INFORMATIONAL
            self._glitch()
            self._events.append(Informational(stream.number, status, headers))
            return None
        granted = stream.connect and status < 300
        if granted:
            length = -1
        elif stream.head_method or status == 204 or status == 304:
            length = 0
        if ends and length > 0:
            return Rule.CONTENT
        stream.in_head = True
        stream.length_in = length
        stream.tunnel = granted
        self._events.append(response_head(stream.id, status, headers, _V2, None))
        if stream.connect and not granted and stream.request_ended:
            stream.end_sent = True
            self._finish(stream)
        if ends:
            self._end_in(stream)
        return None

    cdef object _read_trailers(self, _Stream stream, bint ends):
        cdef _Decoder found = self._decoder
        cdef list trailers
        if not ends:
            return Rule.TRAILERS_NOT_LAST
        if stream.tunnel or (stream.connect and not self._client):
            return Rule.TUNNEL_FRAME
        if found.found.too_large:
            return Rule.LIST_SIZE
        if found.found.odd or found.found.seen or found.found.not_in_trailers:
            try:
                trailers = read_trailers(found.fields)
            except MalformedError as exc:
                return exc.rule
        else:
            trailers = found.fields
        if stream.length_in > 0:
            return Rule.CONTENT
        if trailers and not stream.swallowed:
            self._events.append(Trailers(stream.id, trailers))
        self._end_in(stream)
        return None

    # The other frames

    cdef int _read_rst(self, unsigned int stream_id, const unsigned char *p) except -1:
        cdef _Stream stream = self._find(stream_id)
        cdef unsigned int code = _long(p)
        if stream is None:
            self._check_closed(stream_id)
            return self._glitch()
        self._tail = None
        self._give_up(stream)
        untouched = self._client and code == REFUSED_STREAM and not stream.in_head
        self._events.append(Reset(stream.number, f"the peer reset the stream: {code_name(code)}", code, untouched))
        if not self._client:
            self._charge_reset()
        return 0

    cdef int _read_settings(self, int flags, const unsigned char *p, Py_ssize_t size) except -1:
        cdef Py_ssize_t at = 0
        cdef int setting
        cdef unsigned int value
        cdef long long window = self._peer_window, change
        cdef int table = -1
        cdef int connect = self._peer_connect
        cdef object most = self._peer_max_streams
        cdef _Stream stream
        if flags & ACK:
            if not self._settings_unacked:
                return self._glitch()
            self._settings_unacked -= 1
            return 0
        if self._settings_seen:
            self._glitch()
        self._settings_seen = True
        if size > _MAX_SETTINGS * 6:
            self._fail(Rule.SETTING_COUNT)
        while at < size:
            setting = (p[at] << 8) | p[at + 1]
            value = _long(p + at + 2)
            at += 6
            if setting == 1:
                table = TABLE_OCTETS if value > TABLE_OCTETS else <int>value
            elif setting == 2:
                if value > (0 if self._client else 1):
                    self._fail(Rule.SETTING)
            elif setting == 3:
                most = value
            elif setting == 4:
                if value > _MAX_WINDOW:
                    self._fail(Rule.SETTING_WINDOW)
                window = value
            elif setting == 5:
                if not _DATA_FRAME <= value < 0x1000000:
                    self._fail(Rule.SETTING)
            elif setting == 8:
                if value > 1 or (value == 0 and self._peer_connect):
                    self._fail(Rule.SETTING)
                connect = <int>value
        change = window - self._peer_window
        if change > 0:
            for stream in self._streams.values():
                if stream.out_window + change > _MAX_WINDOW:
                    self._fail(Rule.SETTING_WINDOW)
        self._peer_window = window
        for stream in self._streams.values():
            stream.out_window += change
        if table >= 0:
            self._out.resize(table)
        self._tail = None
        self._out.header(0, F_SETTINGS, ACK, 0)
        self._peer_max_streams = most
        self._peer_connect = connect
        self._events.append(PeerSettings(most, bool(connect)))
        self._may_pump = True
        return 0

    cdef int _read_ping(self, int flags, const unsigned char *p) except -1:
        cdef bytes data = PyBytes_FromStringAndSize(<const char *>p, 8)
        if not flags & ACK:
            self._glitch()
            return self._write_ping(data, ACK)
        if self._pings and self._pings[0] == data:
            self._pings.popleft()
            self._events.append(PingAck(data))
        elif data == _DRAIN_PING and self._draining and not self._client and self._last_accepted == _MAX_ID:
            self._write_goaway(self._highest, NO_ERROR, _EMPTY)
        else:
            self._glitch()
        return 0

    cdef int _read_goaway(self, const unsigned char *p, Py_ssize_t size) except -1:
        cdef unsigned int last = _long(p) & _MAX_ID
        cdef unsigned int code = _long(p + 4)
        cdef _Stream stream
        cdef bytes detail = PyBytes_FromStringAndSize(<const char *>p + 8, min(size, 200) - 8)
        self._glitch()
        if last < self._peer_goaway:
            self._peer_goaway = last
        self._events.append(GoAway(last, code, f"{code_name(code)} {detail!r}"))
        if self._client:
            for stream in [stream for stream in self._streams.values() if (<_Stream>stream).id > last]:
                self._reset_stream(stream, CANCEL)
                self._events.append(Reset(stream.number, "the peer goes away", REFUSED_STREAM, untouched=True))
        return 0

    cdef int _read_window_update(self, unsigned int stream_id, const unsigned char *p) except -1:
        cdef long long increment = _long(p) & _MAX_ID
        cdef _Stream stream
        self._glitch()
        if stream_id == 0:
            if increment == 0:
                self._fail(Rule.WINDOW_ZERO)
            if self._out_window + increment > _MAX_WINDOW:
                self._fail(Rule.WINDOW_OVERFLOW)
            self._out_window += increment
        else:
            stream = self._find(stream_id)
            if stream is None:
                return self._check_closed(stream_id)
            if increment == 0:
                return self._stream_error(stream, Rule.WINDOW_ZERO)
            if stream.out_window + increment > _MAX_WINDOW:
                return self._stream_error(stream, Rule.WINDOW_OVERFLOW)
            stream.out_window += increment
        self._may_pump = True
        return 0


cdef class H2NativeServer(_Connection):
    """Our side of a downstream connection: requests in, responses out."""

    def __init__(self, limits=None):
        self._client = False
        _Connection.__init__(self, limits)

    @property
    def reusable(self):
        return not self._dead and not self._closed and not self._is_draining()

    cpdef list resume(self):
        """What came for tunnels before they were granted. To be called after the head that grants one."""
        cdef _Stream stream
        cdef list events = []
        for stream in self._resumable:
            if stream.held:
                events += stream.held
                stream.held = None
        self._resumable = []
        return events


cdef class H2NativeClient(_Connection):
    """Our side of an upstream connection: requests out, responses in."""

    def __init__(self, limits=None):
        self._client = True
        _Connection.__init__(self, limits)

    @property
    def reusable(self):
        return self._may_open()

    @property
    def next_stream_id(self):
        return self._next_id

    @property
    def free_streams(self):
        if not self._may_open():
            return 0
        return max(0, self._most_streams() - len(self._streams))

    @property
    def connect_protocol(self):
        return self._peer_connect
