cimport cython
from netproxy.codec.fields cimport seen_in
from netproxy.codec.events cimport Data, End, Informational, RequestHead, ResponseHead, Trailers
from netproxy.decide.route cimport Choice, PortTable, Tables
from netproxy.observe.record cimport Recorder, Who
from netproxy.relay.downstream cimport Downstream
from netproxy.relay.exchange cimport RequestEdits, edit_request, edit_response
from netproxy.relay.facts cimport Path, path_to
from netproxy.relay.replay cimport Replay, replay_of
from netproxy.relay.services cimport Facts, Services
from netproxy.relay.trace cimport Trace, begin
from netproxy.upstream.pool cimport PoolKey
from netproxy.relay.upstream cimport Requester, Upstream, UpstreamHttp

cdef long _CONNECTING, _UPSTREAM_FULL
cdef long _EXPECT, _UPGRADE, _REQUEST_ID, _NAMING, _TRACE
cdef object _OK, _DOWNSTREAM_CLOSED

@cython.locals(exchange=Exchange)
cpdef begin_exchange(Downstream connection, RequestHead head)

cdef class Exchange(Requester):
    cdef Downstream _connection
    cdef Services _services
    cdef Facts _facts
    cdef RequestHead _head
    cdef Path _path
    cdef double _started
    cdef Choice _choice
    cdef object _targets
    cdef object _failed
    cdef PoolKey _key
    cdef bint _is_queuing
    cdef list _queue
    cdef RequestHead _sent_head
    cdef Replay _replay
    cdef object _expectation
    cdef bint _tunnel
    cdef bint _ended_in
    cdef bint _ended_out
    cdef bint _request_sent
    cdef bint _response_started
    cdef bint _response_done
    cdef bint _done
    cdef Upstream _upstream
    cdef object _task
    cdef object _waiter
    cdef object _timer
    cdef Trace _trace
    cdef long _status
    cdef bint _is_grpc
    cdef long _grpc_status
    cdef double _deadline
    cdef bint _ends_early
    cdef long long _moved_in
    cdef long long _moved_out
    cdef long _attempts
    cdef bint _reused
    cdef bint _is_logged
    cdef double _connected_at
    cdef double _head_at

    cdef _begin(self, Downstream connection, RequestHead head)
    @cython.locals(facts=Facts, choice=Choice)
    cdef _start(self)
    cdef _go(self, Choice choice)
    @cython.locals(facts=Facts, head=RequestHead, path=Path, is_http2=bint)
    cdef _connect(self, Choice choice)
    @cython.locals(kept=UpstreamHttp, key=PoolKey)
    cdef _own(self, Choice choice)
    cdef _share(self, Choice choice, PoolKey key, tuple alpn)
    @cython.locals(facts=Facts, tables=Tables, port=PortTable)
    cdef Choice _decide(self)
    @cython.locals(facts=Facts, tables=Tables, edits=RequestEdits, head=RequestHead, request_id=bytes, percent=double, seen=long)
    cdef RequestHead _request_head(self)
    @cython.locals(reused=bint, queue=list)
    cdef _open(self, Upstream upstream)
    cdef _forward(self, event)
    cpdef request_data(self, Data event)
    cpdef request_end(self, End event)
    cpdef downstream_writable(self, bint ok)
    cdef _response_data(self, Data event)
    cdef _rare_response(self, event)
    cdef _response_head(self, ResponseHead event)
    cdef _end_way(self, long way)
    @cython.locals(upstream=Upstream)
    cdef _response_end(self)
    @cython.locals(facts=Facts, path=Path, who=Who, duration_s=double)
    cdef _over(self, reason, bint must_close, bint reset, str detail, str decided_by)
