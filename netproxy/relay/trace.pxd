cimport cython

cdef class Trace:
    cdef readonly bytes trace_id
    cdef readonly bytes span_id
    cdef readonly bytes parent_id
    cdef readonly bint sampled

cdef class Ids:
    cdef object _entropy
    cdef long _block
    cdef bytes _digits
    cdef Py_ssize_t _at

    @cython.locals(taken=bytes, digits_="const char *")
    cpdef bytes take(self, Py_ssize_t digits)

cpdef Trace begin(list headers, Ids ids, double percent)
cdef bytes _traceparent(Trace trace, long flags)
cdef bint _is_drawn(bytes trace_id, double percent) except -1
@cython.locals(trace_id=bytes)
cdef Trace _begin(Ids ids, double percent, bytes said)
