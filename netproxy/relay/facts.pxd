cimport cython
from netproxy.decide.route cimport Choice
from netproxy.observe.record cimport Who
from netproxy.relay.services cimport Facts, Services
from netproxy.upstream.pool cimport PoolKey

cdef long _MAX_PATHS

cdef class Path:
    cdef readonly object service
    cdef readonly object identity
    cdef readonly PoolKey key
    cdef readonly dict shared_keys
    cdef readonly Who who

@cython.locals(paths=dict, version=long, path=Path)
cpdef Path path_to(Facts facts, Services services, Choice choice)
