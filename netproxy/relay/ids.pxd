cimport cython

cdef bytes _VARIANTS

cdef class Ids:
    cdef bytes _form
    cdef object _entropy
    cdef Py_ssize_t _count
    cdef Py_ssize_t _digits
    cdef Py_ssize_t _size
    cdef bytes _texts
    cdef Py_ssize_t _at
    cdef Py_ssize_t _end

    @cython.locals(texts="const char *", at=Py_ssize_t)
    cpdef bytes take(self)
    @cython.locals(
        form="const char *", digits="const char *", texts="char *", size=Py_ssize_t, number=Py_ssize_t, start=Py_ssize_t,
        at=Py_ssize_t, digit="char", room=bytearray, found=bytes,
    )
    cdef _fill(self)
