cimport cython

cdef class Ids:
    cdef object _form
    cdef object _entropy
    cdef object _count
    cdef Py_ssize_t _size
    cdef bytes _texts
    cdef Py_ssize_t _at
    cdef Py_ssize_t _end

    @cython.locals(texts="const char *", at=Py_ssize_t)
    cpdef bytes take(self)
    cdef _fill(self)
