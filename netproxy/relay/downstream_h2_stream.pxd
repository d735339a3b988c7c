from netproxy.relay.downstream cimport Downstream

cdef class Http2Stream(Downstream):
    cdef public bint _blocked
    cdef public object _connection
    cdef public bint _ended
    cdef public object _engine
    cdef public object _exchange
    cdef public object _first
    cdef public long _holds
    cdef public object _id
    cdef public object _input
    cdef public bint _is_ready
    cdef public bint _over
    cdef public long long _owed
    cdef public long long _queued
    cdef public object _trailers

    cpdef proceed(self)
    cpdef data(self, event)
    cpdef end(self)
    cpdef _finish_request(self)
    cpdef _settle(self)
    cpdef writable(self)
    cpdef _wake(self)
    cpdef _leave(self)

