cimport cython

cdef class PoolKey:
    cdef readonly str workload
    cdef readonly object endpoint
    cdef readonly str tls
    cdef Py_hash_t _hash

    cdef bint _names(self, PoolKey other) except -1


cdef class Pool:
    cdef public Py_ssize_t max_idle
    cdef public Py_ssize_t max_open
    cdef readonly dict _idle
    cdef readonly dict _open
    cdef readonly Py_ssize_t idle_count

    @cython.locals(waiting=list)
    cpdef take(self, PoolKey key)
    cpdef bint reserve(self, PoolKey key) except -1
    cpdef closed(self, PoolKey key)
    @cython.locals(waiting=list)
    cpdef give(self, PoolKey key, connection, double now)
    cpdef bint remove(self, PoolKey key, connection) except -1
