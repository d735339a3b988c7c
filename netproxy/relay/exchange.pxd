cimport cython
from netproxy.decide.match cimport Request, received
from netproxy.codec.events cimport RequestHead, ResponseHead, request_head, response_head

cdef long _SEEN_CONNECTION, _SEEN_HOP, _SEEN_XFCC, _SEEN_EXPECT, _SEEN_HOST, _SEEN_REQUEST_ID
cdef long _SEEN_DATE, _SEEN_REASON, _SEEN_UPGRADE, _SEEN_NAMED, _SEEN_TRACE
cdef long _SEEN_DROPS, _SEEN_RESPONSE_DROPS
cdef dict _TAGS
cdef Py_ssize_t _XFCC_SIZE

cdef class RequestEdits:
    cdef readonly bytes xfcc
    cdef readonly bytes dialled
    cdef readonly bytes client
    cdef readonly str forwarded
    cdef readonly bytes request_id
    cdef readonly bytes via

@cython.locals(seen=long, field=tuple, name=bytes)
cpdef long fields_seen(list headers) except -1

@cython.locals(method=bytes, target=bytes, version=bytes, drops_some=bint, headers=list, authority=bytes)
cpdef RequestHead edit_request(RequestHead head, RequestEdits edits, long seen, bytes request_id)

@cython.locals(status=long, headers=list, seen=long, field=tuple, tag=long)
cpdef ResponseHead edit_response(ResponseHead head, bint from_agent, bytes date, bytes via)

@cython.locals(target=bytes, authority=bytes, path=str, query=str, at=Py_ssize_t)
cpdef Request request_for_match(RequestHead head)

cpdef RequestHead request_for_http2(RequestHead head)
@cython.locals(drops=frozenset)
cpdef ResponseHead response_for_http2(ResponseHead head)
@cython.locals(field=tuple)
cdef list _without(list headers, frozenset drops)
@cython.locals(field=tuple)
cpdef bint has(list headers, bytes wanted) except -1
cpdef bint frames_content(list headers) except -1
