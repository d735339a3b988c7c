cimport cython
from netproxy.relay.ids cimport Ids

cdef class Trace:
    cdef readonly bytes trace_id
    cdef readonly bytes span_id
    cdef readonly bytes parent_id
    cdef readonly bint sampled

cdef class TraceIds:
    cdef readonly Ids parents
    cdef readonly Ids spans

@cython.locals(parent=bytes)
cpdef Trace begin(list headers, TraceIds ids, double percent)
cdef bytes _traceparent(Trace trace, long flags)
cdef bint _is_drawn(bytes trace_id, double percent) except -1
@cython.locals(parent=bytes, trace_id=bytes)
cdef Trace _begin(TraceIds ids, double percent, bytes said)
