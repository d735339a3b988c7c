cimport cython
from netproxy.codec.engine cimport H1Engine
from netproxy.codec.events cimport End, RequestHead, ResponseHead
from netproxy.relay.exchange cimport frames_content, has
from netproxy.relay.services cimport Services
from netproxy.stream cimport Stream
from netproxy.upstream.pool cimport PoolKey

cdef class Requester:
    cpdef upstream_writable(self, bint ok)
    cpdef response_begins(self)
    cpdef response(self, event)

cdef class Upstream:
    cdef readonly bint is_shared
    cdef readonly bint reused

    cpdef begin(self, Requester exchange)
    cpdef send(self, event)
    cpdef hold(self, bint on)
    cpdef begin_tunnel(self)
    cpdef end_sending(self)
    cpdef tunnel_done(self)
    cpdef idle(self, double now)
    cpdef abort(self)

cdef class UpstreamHttp(Upstream):
    cdef RequestHead _asked
    cdef bint _closed
    cdef double _done_at
    cdef H1Engine _engine
    cdef Requester _exchange
    cdef RequestHead _head
    cdef Services _services
    cdef bint _tunnel
    cdef long _uses
    cdef bint _writable
    cdef readonly PoolKey key
    cdef readonly Stream stream
    cdef readonly object workload

    @cython.locals(head=RequestHead)
    cpdef send(self, event)
    cdef _send(self, event)
    cdef _send_head_of_http2(self, RequestHead head)
    cpdef data_received(self, bytes data)
    cdef _dispatch(self, list events)
