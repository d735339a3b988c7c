from netproxy.relay.upstream cimport Upstream

cdef class Http2Connection:
    cdef public bint _answered
    cdef public bint _closed
    cdef public double _closing_at
    cdef public object _engine
    cdef public bint _freed
    cdef public double _heard_at
    cdef public bint _in_turn
    cdef public object _left
    cdef public double _partial_since
    cdef public double _ping_at
    cdef public double _pinged_at
    cdef public object _ready
    cdef public object _requests
    cdef public long _resets
    cdef public bint _scheduled
    cdef public object _shared
    cdef public double _started_at
    cdef public bint _writable
    cdef public double idle_since
    cdef public bint is_up
    cdef public object key
    cdef public bint peer_ended
    cdef public object stream
    cdef public bint was_told

    cpdef data_received(self, bytes data)
    cpdef _receive(self, bytes data, double now)
    cpdef _event(self, event)
    cpdef begin(self, request, head)
    cpdef over(self, stream_id)
    cpdef changed(self)
    cpdef _later(self)
    cpdef _flush(self)
    cpdef _write(self)

cdef class Http2Request(Upstream):
    cdef public object _connection
    cdef public object _exchange
    cdef public object _full
    cdef public bint _held
    cdef public long long _owed
    cdef public object _protocol
    cdef public object _sent
    cdef public object _stream_id

    cpdef event(self, event)

