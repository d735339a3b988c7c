cimport cython

cdef Py_ssize_t _BUCKETS, REQ_COUNT, REQ_SUM_US, REQ_BYTES_IN, REQ_BYTES_OUT, REQ_BUCKETS

cdef class Who:
    cdef readonly object parties
    cdef readonly object security
    cdef public long row
    cdef public long status
    cdef public object reason
    cdef public str protocol
    cdef public long grpc_status

cdef class Recorder:
    cdef readonly object arena
    cdef unsigned long long[::1] _cells
    cdef unsigned long long[::1] _bounds
    cdef dict _rows

    @cython.locals(row=Py_ssize_t, duration_us="unsigned long long", bucket=Py_ssize_t, cells="unsigned long long[::1]", bounds="unsigned long long[::1]")
    cpdef count(
        self, Who who, long status, reason, str protocol, long grpc_status, double duration_s,
        unsigned long long moved_in, unsigned long long moved_out,
    )
