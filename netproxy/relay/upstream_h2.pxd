cimport cython
from netproxy.codec.engine cimport H2Engine
from netproxy.codec.events cimport Data, End, Informational, RequestHead, ResponseHead, Trailers
from netproxy.relay.exchange cimport request_for_http2
from netproxy.relay.upstream cimport Requester, Upstream
from netproxy.stream cimport Stream

cdef class Http2Connection:
    cdef public bint _answered
    cdef public bint _closed
    cdef public double _closing_at
    cdef public H2Engine engine
    cdef public bint _freed
    cdef public double _heard_at
    cdef public bint _in_turn
    cdef public dict _left
    cdef public double _partial_since
    cdef public double _ping_at
    cdef public double _pinged_at
    cdef public object _ready
    cdef public dict _requests
    cdef public long _resets
    cdef public bint _scheduled
    cdef public object _shared
    cdef public double _started_at
    cdef public double idle_since
    cdef public bint is_up
    cdef public bint is_writable
    cdef public object key
    cdef public bint peer_ended
    cdef public Stream stream
    cdef public bint was_told

    cpdef data_received(self, bytes data)
    @cython.locals(engine=H2Engine, before=Py_ssize_t, left=Py_ssize_t)
    cdef _receive(self, bytes data, double now)
    cdef _event(self, event)
    @cython.locals(request=Http2Request)
    cdef _tell(self, stream_id, event)
    @cython.locals(engine=H2Engine)
    cpdef begin(self, Http2Request request, RequestHead head)
    @cython.locals(queued=Py_ssize_t)
    cpdef over(self, stream_id)
    cpdef changed(self)
    cpdef _later(self)
    cdef _flush(self)
    @cython.locals(out=list)
    cdef _write(self)

cdef class Http2Request(Upstream):
    cdef public Http2Connection _connection
    cdef public Requester _exchange
    cdef public bint _full
    cdef public bint _held
    cdef public long long _owed
    cdef public bytes _protocol
    cdef public RequestHead _sent
    cdef public object _stream_id

    @cython.locals(connection=Http2Connection, exchange=Requester)
    cpdef event(self, event)
    cdef _send_head(self, Http2Connection connection, RequestHead head)
    @cython.locals(connection=Http2Connection)
    cdef _finish(self)
