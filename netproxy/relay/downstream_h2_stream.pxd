cimport cython
from netproxy.codec.engine cimport H2Engine
from netproxy.codec.events cimport Data, End, Informational, RequestHead, ResponseHead, Trailers
from netproxy.relay.downstream cimport Downstream
from netproxy.relay.exchange cimport response_for_http2
from netproxy.relay.request cimport Exchange, begin_exchange
from netproxy.relay.services cimport Facts, Services

cdef End _END
cdef long _UNREAD

cdef class StreamOwner:
    cdef readonly H2Engine engine
    cdef readonly Facts facts
    cdef readonly Services services
    cdef readonly double heard_at
    cdef readonly bint is_writable

    cpdef began(self, Http2Stream stream)
    cpdef ready(self, Http2Stream stream)
    cpdef sent(self, Py_ssize_t content)
    cpdef resume(self)
    cpdef forget(self, stream_id)

@cython.locals(stream=Http2Stream)
cpdef Http2Stream stream_of(StreamOwner connection, stream_id, first)

cdef class Http2Stream(Downstream):
    cdef public bint _blocked
    cdef public StreamOwner _connection
    cdef public bint _ended
    cdef public H2Engine _engine
    cdef public Exchange _exchange
    cdef public object _first
    cdef public long _holds
    cdef public object _id
    cdef public bytearray _input
    cdef public bint _is_ready
    cdef public bint _over
    cdef public long long _owed
    cdef public long long _queued
    cdef public Trailers _trailers

    cdef _open(self, StreamOwner connection, stream_id, first)
    cpdef proceed(self)
    cpdef data(self, Data event)
    cpdef trailers(self, Trailers event)
    cpdef end(self)
    cdef _finish_request(self)
    cdef _settle(self)
    cpdef writable(self)
    cdef _wake(self)
    cdef Exchange _leave(self)
