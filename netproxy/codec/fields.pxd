cimport cython

cdef dict _BITS
cdef Py_ssize_t _XFCC_SIZE
cdef long _CONNECTION, _NAMING, _XFCC_LIKE

@cython.locals(seen=long, bits=long, field=tuple, name=bytes)
cpdef long seen_in(list headers) except -1
cpdef bint is_like_xfcc(bytes name) except -1
