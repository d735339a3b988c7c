cdef class Http2Downstream:
    cdef public double _activity
    cdef public bint _closed
    cdef public double _drained_at
    cdef public double _heard_at
    cdef public bint _in_turn
    cdef public long long _linger_left
    cdef public double _linger_until
    cdef public object _more
    cdef public double _partial_since
    cdef public double _ping_at
    cdef public object _ready
    cdef public long long _said
    cdef public bint _scheduled
    cdef public long long _seen
    cdef public double _started_at
    cdef public object _streams
    cdef public long long _taken
    cdef public double _taken_at
    cdef public bint _writable
    cdef public long long _written
    cdef public object engine
    cdef public object facts
    cdef public long long requests
    cdef public object services
    cdef public object stream
    cdef public object workload

    cpdef data_received(self, bytes data)
    cpdef _receive(self, bytes data)
    cpdef _later(self)
    cpdef _wake(self)
    cpdef _write(self)
    cpdef _handle(self, events)
    cpdef _begin(self, event)
    cpdef _of_stream(self, event)
    cpdef began(self, stream)
    cpdef ready(self, stream)
    cpdef sent(self, long content)
    cpdef forget(self, stream_id)

