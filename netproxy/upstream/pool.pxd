cimport cython

cdef class Pool:
    cdef public Py_ssize_t max_idle
    cdef public Py_ssize_t max_open
    cdef readonly dict _idle
    cdef readonly dict _open
    cdef readonly Py_ssize_t idle_count

    @cython.locals(waiting=list)
    cpdef take(self, key)
    cpdef bint reserve(self, key) except -1
    cpdef closed(self, key)
    @cython.locals(waiting=list)
    cpdef give(self, key, connection, double now)
    cpdef bint remove(self, key, connection) except -1
