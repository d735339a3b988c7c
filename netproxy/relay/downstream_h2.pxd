cimport cython
from netproxy.codec.engine cimport H2Engine
from netproxy.codec.events cimport Data, End, RequestHead, Trailers
from netproxy.relay.downstream_h2_stream cimport Http2Stream, StreamOwner, stream_of
from netproxy.stream cimport Stream

cdef class Http2Downstream(StreamOwner):
    cdef public double _activity
    cdef public bint _closed
    cdef public double _drained_at
    cdef public bint _in_turn
    cdef public long long _linger_left
    cdef public double _linger_until
    cdef public list _more
    cdef public double _partial_since
    cdef public double _ping_at
    cdef public list _ready
    cdef public long long _said
    cdef public bint _scheduled
    cdef public long long _seen
    cdef public double _started_at
    cdef public dict _streams
    cdef public long long _taken
    cdef public double _taken_at
    cdef public long long _written
    cdef public long long requests
    cdef public Stream stream
    cdef public object workload

    cpdef data_received(self, bytes data)
    @cython.locals(engine=H2Engine, now=double, before=Py_ssize_t, left=Py_ssize_t)
    cdef _receive(self, bytes data)
    @cython.locals(stream=Http2Stream)
    cdef _turn(self, events=*)
    cpdef _later(self)
    cdef _wake(self)
    @cython.locals(out=list, data=bytes)
    cdef _write(self)
    cdef _handle(self, events)
    @cython.locals(stream=Http2Stream)
    cdef _begin(self, event, stream_id)
    @cython.locals(stream=Http2Stream)
    cdef _ends(self, stream_id)
    @cython.locals(stream=Http2Stream)
    cdef _brings(self, Data event, stream_id)
    @cython.locals(stream=Http2Stream)
    cdef _of_stream(self, event)
