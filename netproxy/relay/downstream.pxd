from netproxy.relay.services cimport Facts, Services

cdef class Downstream:
    cdef readonly Facts facts
    cdef readonly Services services
    cdef readonly str protocol
    cdef public double activity

    cdef begin(self, Facts facts, Services services, str protocol, double now)
    cpdef bint takes_more(self) except -1
    cpdef attach(self, exchange)
    cpdef hold(self, long why, bint on)
    cpdef touch(self)
    cpdef send(self, event)
    cpdef announce_close(self)
    cpdef begin_tunnel(self)
    cpdef end_sending(self)
    cpdef tunnel_done(self)
    cpdef exchange_done(self, bint must_close)
    cpdef reset(self)
