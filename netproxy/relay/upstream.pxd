from netproxy.relay.services cimport Services

cdef class UpstreamHttp:
    cdef object _asked
    cdef bint _closed
    cdef double _done_at
    cdef object _engine
    cdef object _exchange
    cdef object _head
    cdef Services _services
    cdef bint _tunnel
    cdef long _uses
    cdef bint _writable
    cdef readonly object key
    cdef readonly object stream
    cdef readonly object workload

    cpdef begin(self, exchange)
    cpdef send(self, event)
    cdef _send(self, event)
    cpdef hold(self, bint on)
    cpdef idle(self)
    cpdef data_received(self, bytes data)
    cdef _dispatch(self, events)
