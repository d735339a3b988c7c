cdef class H1Engine:
    cpdef list receive(self, bytes data)
    cpdef list send(self, stream_id, event)
    cpdef bytes encode(self, event)
    cpdef list resume(self)
    cpdef keep_spelling(self, bint on)
    cpdef bint is_last(self) except -1
    cpdef bint is_reusable(self) except -1
    cpdef bint is_stuffed(self) except -1
    cpdef Py_ssize_t held(self) except -1
