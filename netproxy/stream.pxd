cdef class Stream:
    cpdef bint is_closing(self) except -1
    cpdef write(self, bytes data)
    cpdef write_eof(self)
    cpdef pause_reading(self)
    cpdef resume_reading(self)
    cpdef close(self)
    cpdef abort(self)
    cpdef Py_ssize_t buffered(self) except -1
