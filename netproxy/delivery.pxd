cdef class Delivery:
    cdef public object target
    cdef public bint ready
    cdef object _more
    cdef object _held
    cdef bint _eof
    cdef bint _paused
    cdef bint _blocked
    cdef bint _told_blocked
    cdef bint _stopped
    cdef bint _lost
    cdef object _lost_exc
    cdef bint _over
    cdef bint _scheduled

    cpdef replace(self, sink)
    cpdef pause(self)
    cpdef resume(self)
    cpdef hold(self, bytes data)
    cpdef eof(self)
    cpdef writable(self, bint ok)
    cpdef stop(self)
    cpdef lost(self, exc)
    cdef _tell_closed(self, target)
    cdef _wake(self)
    cdef _go_on(self)
