cimport cython
from netproxy.decide.balance cimport pick
from netproxy.decide.match cimport Prepared, Request, Ruling

cdef class EndpointState:
    cdef readonly object addr
    cdef readonly object endpoint
    cdef public long outstanding

cdef class PortTable:
    cdef public dict cycles
    cdef readonly Ruling tcp_rule
    cdef readonly list endpoints
    cdef readonly object port
    cdef readonly str http_version
    cdef readonly dict ready
    cdef public Prepared rules
    cdef readonly object service
    cdef readonly object spec

cdef class Way:
    cdef long version
    cdef PortTable target
    cdef object rule
    cdef double request_timeout_s

cdef class Choice:
    cdef readonly object service
    cdef readonly EndpointState endpoint
    cdef readonly object rule
    cdef readonly double request_timeout_s
    cdef readonly str http_version

cdef class Tables:
    cdef object _random
    cdef readonly long version
    cdef public object mesh
    cdef public dict workloads
    cdef public dict svids
    cdef public dict services
    cdef public dict ports
    cdef public object egress
    cdef public long egress_version
    cdef readonly dict _by_vip
    cdef readonly dict _vips
    cdef readonly dict _by_address
    cdef readonly dict _endpoints
    cdef readonly dict _direct
    cdef public long broken_patterns
    cdef public bint http1_in_http2
    cdef public bint keeps_spelling
    cdef public bint gives_ids
    cdef public double trace_percent
    cdef public bytes via
    cdef public long long buffer_bytes

    @cython.locals(ruling=Ruling)
    cpdef Choice route(self, PortTable port, Request request, families)
    cpdef Choice tcp(self, PortTable port, families)
    @cython.locals(found=Way)
    cdef Choice _backend(self, PortTable port, Ruling ruling, families)
    @cython.locals(choice=Choice)
    cdef Choice _endpoint(self, PortTable port, rule, double timeout_s, families)
