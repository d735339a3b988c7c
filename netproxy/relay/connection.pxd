from netproxy.codec.engine cimport H1Engine
from netproxy.codec.events cimport Data, End, RequestHead, Trailers
from netproxy.relay.downstream cimport Downstream
from netproxy.relay.request cimport Exchange, begin_exchange
from netproxy.stream cimport Stream

cdef long _PIPELINED, _UNREAD

cdef class HttpConnection(Downstream):
    cdef bint _close_after
    cdef bint _is_fresh
    cdef H1Engine _engine
    cdef Exchange _exchange
    cdef double _head_since
    cdef long _holds
    cdef long long _linger_left
    cdef double _linger_until
    cdef bint _peer_ended
    cdef bint _pumping
    cdef bint _want_resume
    cdef bint _writable
    cdef readonly Stream stream
    cdef readonly object workload

    cpdef data_received(self, bytes data)
    cdef _pump(self, events)
    cdef _dispatch(self, events)
