cimport cython

cdef long _SEEN_CONNECTION, _SEEN_HOP, _SEEN_XFCC, _SEEN_EXPECT, _SEEN_HOST, _SEEN_REQUEST_ID
cdef long _SEEN_DATE, _SEEN_REASON, _SEEN_UPGRADE, _SEEN_NAMED, _SEEN_TRACE
cdef long _SEEN_DROPS, _SEEN_RESPONSE_DROPS
cdef dict _TAGS
cdef Py_ssize_t _XFCC_SIZE
cdef object _new

@cython.locals(seen=long, field=tuple, name=bytes)
cpdef long fields_seen(list headers) except -1

@cython.locals(method=bytes, target=bytes, version=bytes, drops_some=bint, headers=list, authority=bytes)
cpdef edit_request(head, edits, long seen, bytes request_id)

@cython.locals(status=long, headers=list, seen=long, field=tuple, tag=long)
cpdef edit_response(head, bint from_agent, bytes date, bytes via)
