cimport cython
from netproxy.codec.fields cimport is_like_xfcc, seen_in
from netproxy.decide.match cimport Request, received
from netproxy.codec.events cimport RequestHead, ResponseHead, request_head, response_head

cdef long _HOST, _REQUEST_ID, _DATE, _CONNECTION, _DROPS, _RESPONSE_BITS

cdef class RequestEdits:
    cdef readonly bytes xfcc
    cdef readonly bytes dialled
    cdef readonly bytes client
    cdef readonly str forwarded
    cdef readonly bytes request_id
    cdef readonly bytes via

@cython.locals(method=bytes, target=bytes, version=bytes, seen=long, drops_some=bint, headers=list, authority=bytes)
cpdef RequestHead edit_request(RequestHead head, RequestEdits edits, bytes request_id)

@cython.locals(status=long, headers=list, seen=long)
cpdef ResponseHead edit_response(ResponseHead head, bint from_agent, bytes date, bytes via)

@cython.locals(field=tuple, kept=list)
cdef list _without_connection(list headers)

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
