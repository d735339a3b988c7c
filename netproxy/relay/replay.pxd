cdef class Replay:
    cdef object _head
    cdef bint _reused
    cdef bytearray _body
    cdef list _rest

    cpdef keep(self, event)
    cpdef give_up(self)
