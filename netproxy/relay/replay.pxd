from netproxy.codec.events cimport Data, End, RequestHead, Trailers

cdef class Replay:
    cdef RequestHead _head
    cdef bint _reused
    cdef bytearray _body
    cdef list _rest

    cpdef keep(self, event)
    cpdef give_up(self)
