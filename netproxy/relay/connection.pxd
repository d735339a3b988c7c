from netproxy.relay.services cimport Facts, Services

cdef class HttpConnection:
    cdef double _activity
    cdef bint _close_after
    cdef bint _is_fresh
    cdef object _engine
    cdef object _exchange
    cdef double _head_since
    cdef long _holds
    cdef long long _linger_left
    cdef double _linger_until
    cdef bint _peer_ended
    cdef bint _pumping
    cdef bint _want_resume
    cdef bint _writable
    cdef readonly Facts facts
    cdef readonly str protocol
    cdef readonly Services services
    cdef readonly object stream
    cdef readonly object workload

    cpdef data_received(self, bytes data)
    cdef _pump(self, events)
    cdef _dispatch(self, events)
    cpdef touch(self)
    cpdef hold(self, long why, bint on)
    cpdef send(self, event)
