cdef class Engine:
    cpdef send(self, stream_id, event)
    cpdef credit(self, stream_id, n)
    cpdef list resume(self)
    cpdef bint is_last(self) except -1
    cpdef Py_ssize_t held(self) except -1

cdef class H1Engine(Engine):
    cpdef list receive(self, bytes data)
    cpdef bytes encode(self, event)
    cpdef keep_spelling(self, bint on)
    cpdef bint is_reusable(self) except -1
    cpdef bint is_stuffed(self) except -1

cdef class H2Engine(Engine):
    cpdef list receive(self, bytes data, double now=*)
    cpdef list take_output(self)
    cpdef bint is_blocked(self, stream_id) except -1
    cpdef Py_ssize_t queued(self, stream_id) except -1
