from netproxy.decide.route cimport PortTable, Tables
from netproxy.observe.record cimport Recorder
from netproxy.relay.ids cimport Ids
from netproxy.relay.trace cimport TraceIds
from netproxy.upstream.pool cimport Pool

cimport cython

cdef class Stamps:
    cdef Ids _ids
    cdef bytes _date
    cdef double _until

    cpdef bytes request_id(self)
    @cython.locals(wall=double)
    cpdef bytes date(self, double now)

cdef class Services:
    cdef public object loop
    cdef public object now
    cdef public Tables tables
    cdef public Pool pool
    cdef public object dialer
    cdef public Recorder recorder
    cdef public set live
    cdef public bint draining
    cdef public object resolver
    cdef public Stamps stamps
    cdef public object access
    cdef public object shared
    cdef public TraceIds trace_ids
    cdef public object spans
    cdef public object wall

cdef class Facts:
    cdef public object workload
    cdef public object shard
    cdef public object families
    cdef public bint inbound
    cdef public object client
    cdef public object dst
    cdef public object port
    cdef public object egress
    cdef public object peer
    cdef public object peer_sha256
    cdef public double began
    cdef public bint as_http1
    cdef public dict paths
    cdef public long paths_version
    cdef public object edits
    cdef public object edits_for
    cdef public PortTable table
    cdef public long table_version
