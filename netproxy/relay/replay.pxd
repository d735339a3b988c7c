cimport cython
from netproxy.codec.events cimport Data, End, RequestHead, Trailers

cdef frozenset _IDEMPOTENT

cdef class Replay:
    cdef RequestHead _head
    cdef bint _reused
    cdef bytearray _body
    cdef list _rest

    cdef _begin(self, RequestHead head, bint reused)
    cpdef keep(self, event)
    cpdef give_up(self)

@cython.locals(replay=Replay)
cpdef Replay replay_of(RequestHead head, bint reused, bint shared)
