cimport cython

cdef class Message:
    cpdef dict _values(self)

# Heads hold nothing that could lead back to them, so the collector need not know them.

@cython.no_gc
@cython.final
cdef class RequestHead(Message):
    cdef public long stream_id
    cdef public bytes method
    cdef public bytes target
    cdef public list headers
    cdef public bytes http_version
    cdef public object spelling
    cdef public bytes scheme
    cdef public bytes protocol
    cdef public long seen

@cython.no_gc
@cython.final
cdef class ResponseHead(Message):
    cdef public long stream_id
    cdef public long status
    cdef public list headers
    cdef public bytes http_version
    cdef public object spelling
    cdef public long seen

@cython.final
cdef class Informational(Message):
    cdef public long stream_id
    cdef public long status
    cdef public list headers

@cython.final
cdef class Data(Message):
    cdef public long stream_id
    cdef public bytes data

@cython.final
cdef class Trailers(Message):
    cdef public long stream_id
    cdef public list headers

@cython.final
cdef class End(Message):
    cdef public long stream_id

@cython.locals(head=RequestHead)
cpdef RequestHead request_head(
    long stream_id, bytes method, bytes target, list headers, bytes http_version, object spelling, bytes scheme,
    bytes protocol,
)
@cython.locals(head=ResponseHead)
cpdef ResponseHead response_head(long stream_id, long status, list headers, bytes http_version, object spelling)
@cython.locals(event=Data)
cpdef Data content(long stream_id, bytes data)
@cython.locals(event=End)
cpdef End end(long stream_id)
