cimport cython

cdef long _ANY, _EXACT, _PREFIX, _REGEX

cdef class Request:
    cdef readonly str path
    cdef readonly str query
    cdef readonly str method
    cdef dict _headers
    cdef object _fields
    cdef bytes _host
    cdef dict _parameters

    cpdef dict parameters(self)

@cython.locals(request=Request)
cpdef Request received(str path, str query, str method, object fields, bytes host)

cdef class _Work:
    cdef public long left

cdef class _Rest:
    cdef str _method
    cdef list _headers
    cdef list _query
    cdef readonly bint asks

    cpdef bint matches(self, Request request) except -1

cdef class Ruling:
    cdef readonly object rule
    cdef public object way

cdef class Prepared:
    cdef readonly list broken
    cdef _Work _work
    cdef list _matches

    @cython.locals(path=str, kind=long, text=str, directory=str, rest=_Rest, ruling=Ruling)
    cpdef Ruling first(self, Request request)
