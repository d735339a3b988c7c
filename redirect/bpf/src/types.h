/*
 * What lies in the maps. redirect/bpf/layout.py has the same structures, and a test compares sizes and offsets.
 *
 * Addresses are 16 octets in network order, those of IPv4 in mapped form (::ffff:a.b.c.d). Ports of destinations are in
 * network order, all other numbers in the machine's.
 */

struct destination {
	__u32 address[4];
	__u16 port;
	__u16 kind; /* KIND_*: what was done to the socket */
};

struct config {
	__u64 host_netns; /* cookie of the node's own network namespace; 0: no workload is enrolled by cgroup */
	__u64 proxy_cgroups[PROXY_CGROUPS]; /* 0 ends it */
	__u32 mark;
	__u32 mask; /* 0: no socket is told by its mark */
	__u32 cgroups; /* how many workloads are enrolled by cgroup */
	__u32 reserved;
};

struct workload {
	__u64 netns;
	__u32 id; /* of counters and listeners */
	__u32 scope; /* of networks and values; another one for each change of them */
	__u32 flags; /* FLAG_* */
	__u32 listen4;
	__u32 listen6[4];
	__u16 outbound_port;
	__u16 dns_port; /* 0: queries go where they were sent */
	__u16 workers; /* slots for inbound listeners */
	__u16 reserved;
};

struct flow_key {
	__u64 netns;
	__u32 address[4];
	__u16 port;
	__u16 reserved[3];
};

struct network_key {
	__u32 prefixlen; /* of scope and address together */
	__u32 scope;
	__u32 address[4];
};

struct value_key {
	__u32 scope;
	__u32 list; /* VALUE_* */
	__u32 value;
};

struct slot_key {
	__u32 id;
	__u16 family; /* 4 or 6 */
	__u16 worker;
};

struct port_key {
	__u64 netns;
	__u32 port;
	__u32 reserved;
};

struct service_key {
	__u32 address[4];
	__u16 port;
	__u16 reserved;
};

struct service {
	__u32 set; /* of endpoints; another one for each change of them */
	__u32 count;
	__u32 flags; /* SERVICE_* */
};

struct endpoint_key {
	__u32 set;
	__u32 index;
};

/* A row of an alias table: this endpoint below the threshold, else that of `alias`. */
struct endpoint {
	__u32 address[4];
	__u16 port;
	__u16 reserved;
	__u32 threshold;
	__u32 alias;
};

struct counters {
	__u64 count[COUNTERS];
};
