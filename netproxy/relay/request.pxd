cimport cython
from netproxy.decide.route cimport Choice
from netproxy.observe.record cimport Recorder, Who
from netproxy.relay.facts cimport Path
from netproxy.relay.replay cimport Replay
from netproxy.relay.services cimport Facts, Services

cdef class Exchange:
    cdef object _connection
    cdef Services _services
    cdef Facts _facts
    cdef object _head
    cdef long _seen
    cdef Path _path
    cdef double _started
    cdef Choice _choice
    cdef object _targets
    cdef object _failed
    cdef object _key
    cdef bint _is_queuing
    cdef list _queue
    cdef object _sent_head
    cdef Replay _replay
    cdef object _expectation
    cdef bint _tunnel
    cdef bint _ended_in
    cdef bint _ended_out
    cdef bint _request_sent
    cdef bint _response_started
    cdef bint _response_done
    cdef bint _done
    cdef object _upstream
    cdef object _task
    cdef object _waiter
    cdef object _timer
    cdef object _trace
    cdef long _status
    cdef bint _is_grpc
    cdef long _grpc_status
    cdef double _deadline
    cdef bint _ends_early
    cdef long long _moved_in
    cdef long long _moved_out
    cdef long _attempts
    cdef bint _reused
    cdef double _connected_at
    cdef double _head_at

    cpdef start(self)
    cdef _go(self, Choice choice)
    cdef _connect(self, Choice choice)
    cdef _own(self, Choice choice)
    @cython.locals(facts=Facts)
    cdef Choice _decide(self)
    @cython.locals(facts=Facts)
    cdef _request_head(self)
    cdef _open(self, upstream)
    cdef _forward(self, event)
    cpdef request_data(self, event)
    cpdef request_end(self, event)
    cpdef downstream_writable(self, bint ok)
    cpdef upstream_writable(self, bint ok)
    cpdef response_begins(self)
    cpdef response(self, event)
    cdef _rare_response(self, event)
    cdef _response_head(self, event)
    cdef _end_way(self, long way)
    cdef _response_end(self)
