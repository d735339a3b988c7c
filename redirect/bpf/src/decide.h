/*
 * What becomes of a connect(), or of a query for names: passes, goes elsewhere, is refused. The order of the questions
 * is that of redirect/netfilter/rules.py.
 */

enum verdict { PASS, ELSEWHERE, REFUSE };
enum deed { CONNECTS, SENDS };

/* By network namespace, else by cgroup, of which the innermost counts. */
INLINE struct workload *workload_of(struct bpf_sock_addr *ctx)
{
	__u64 netns = netns_cookie(ctx);
	struct workload *found = find(MAP(MAP_PODS), &netns);
	struct config *config;

	if (found)
		return found;
	config = configuration();
	if (!config || !config->cgroups || config->host_netns != netns)
		return NULL;
#pragma unroll
	for (int level = 1; level <= CGROUP_DEPTH; level++) {
		__u64 cgroup = own_ancestor_cgroup(level);
		struct workload *inner;

		if (!cgroup)
			break;
		inner = find(MAP(MAP_CGROUPS), &cgroup);
		if (inner)
			found = inner;
	}
	return found;
}

INLINE int is_proxy(const struct bpf_sock *sk)
{
	struct config *config = configuration();
	__u64 cgroup;

	if (!config)
		return 0;
	if (config->mask && (sk->mark & config->mask) == config->mark)
		return 1;
	if (!config->proxy_cgroups[0])
		return 0;
	cgroup = own_cgroup();
#pragma unroll
	for (int i = 0; i < PROXY_CGROUPS; i++)
		if (config->proxy_cgroups[i] == cgroup)
			return 1;
	return 0;
}

INLINE int is_listening(struct bpf_sock_addr *ctx, const struct workload *workload, int family, __u16 port, int is_query)
{
	struct bpf_sock_tuple tuple = {};
	struct bpf_sock *sk;
	int listening;

	if (family == 4) {
		tuple.ipv4.saddr = workload->listen4;
		tuple.ipv4.daddr = workload->listen4;
		tuple.ipv4.dport = NET16(port);
		sk = is_query ? find_receiver(ctx, &tuple, sizeof(tuple.ipv4), BPF_F_CURRENT_NETNS, 0)
			      : find_listener(ctx, &tuple, sizeof(tuple.ipv4), BPF_F_CURRENT_NETNS, 0);
	} else {
#pragma unroll
		for (int i = 0; i < 4; i++)
			tuple.ipv6.saddr[i] = tuple.ipv6.daddr[i] = workload->listen6[i];
		tuple.ipv6.dport = NET16(port);
		sk = is_query ? find_receiver(ctx, &tuple, sizeof(tuple.ipv6), BPF_F_CURRENT_NETNS, 0)
			      : find_listener(ctx, &tuple, sizeof(tuple.ipv6), BPF_F_CURRENT_NETNS, 0);
	}
	if (!sk)
		return 0;
	listening = is_query || sk->state == STATE_LISTEN;
	release(sk);
	return listening;
}

/*
 * For getpeername(), answers to queries and, by way of sock_ops, for the proxy. Goes with the socket; one that is
 * connected again, after a failure or AF_UNSPEC, has the latest. 0: no memory.
 */
INLINE int remember(struct bpf_sock *sk, const struct destination *asked)
{
	struct destination *peer;

	peer = socket_storage(MAP(MAP_PEERS), sk, NULL, asked->kind ? BPF_SK_STORAGE_GET_F_CREATE : 0);
	if (!peer)
		return !asked->kind;
	/* sendto() does not change with whom a socket is connected. */
	if (asked->kind == KIND_QUERIED && peer->kind == KIND_STEERED)
		return 1;
	*peer = *asked;
	return 1;
}

INLINE __u16 listener_of(const struct workload *workload, __u32 port)
{
	return port == PORT_OF_NAMES && workload->dns_port ? workload->dns_port : workload->outbound_port;
}

INLINE struct endpoint *pick(const struct service *service, __u64 client)
{
	/* With affinity the same client has the same numbers. The factors are those of splitmix64. */
	__u64 mixed = client * 0x9e3779b97f4a7c15ULL;
	struct endpoint_key key = {.set = service->set};
	struct endpoint *found;
	__u32 row, chance;

	mixed = (mixed ^ (mixed >> 30)) * 0xbf58476d1ce4e5b9ULL;
	mixed = (mixed ^ (mixed >> 27)) * 0x94d049bb133111ebULL;
	row = service->flags & SERVICE_AFFINITY ? (__u32)(mixed >> 32) : random_number();
	chance = service->flags & SERVICE_AFFINITY ? (__u32)mixed : random_number();
	key.index = (__u32)(((__u64)row * service->count) >> 32);
	found = find(MAP(MAP_ENDPOINTS), &key);
	if (found && chance >= found->threshold) {
		key.index = found->alias;
		found = find(MAP(MAP_ENDPOINTS), &key);
	}
	return found;
}

/* A service that is balanced here and now. Fills `to` on ELSEWHERE; PASS: it is none. */
INLINE enum verdict balance(const struct workload *workload, struct destination *to)
{
	struct service_key key = {
		.address = {to->address[0], to->address[1], to->address[2], to->address[3]},
		.port = to->port,
	};
	struct service *service = find(MAP(MAP_SERVICES), &key);
	struct endpoint *endpoint;

	if (!service)
		return PASS;
	if (!service->count)
		return REFUSE;
	endpoint = pick(service, workload->netns ^ ((__u64)workload->id << 32));
	if (!endpoint) {
		/* The set was replaced since: the next one has been complete before. */
		service = find(MAP(MAP_SERVICES), &key);
		if (!service)
			return PASS;
		endpoint = service->count ? pick(service, workload->netns ^ ((__u64)workload->id << 32)) : NULL;
		if (!endpoint)
			return REFUSE;
	}
#pragma unroll
	for (int i = 0; i < 4; i++)
		to->address[i] = endpoint->address[i];
	to->port = endpoint->port;
	return ELSEWHERE;
}

/* A COUNT_* that says why the connection is none of the proxy's, or -1. */
INLINE int out_of_scope(const struct workload *workload, __u32 networks, __u32 port)
{
	__u32 flags = workload->flags;

	if (networks & NETWORK_VIP)
		return -1;
	if (flags & FLAG_OUT_EXCLUDE_UIDS && is_listed(workload, VALUE_OUT_EXCLUDE_UID, (__u32)own_user()))
		return COUNT_BYPASS_EXCLUDED;
	if (networks & NETWORK_OUT_EXCLUDE)
		return COUNT_BYPASS_EXCLUDED;
	if (flags & FLAG_OUT_EXCLUDE_PORTS && is_listed(workload, VALUE_OUT_EXCLUDE_PORT, port))
		return COUNT_BYPASS_EXCLUDED;
	if (port == PORT_OF_NAMES && workload->dns_port)
		return -1; /* names lead to VIPs */
	if (flags & FLAG_OUT_INCLUDE_NETWORKS && !(networks & NETWORK_OUT_INCLUDE))
		return COUNT_BYPASS_NOT_INCLUDED;
	if (flags & FLAG_OUT_INCLUDE_PORTS && !is_listed(workload, VALUE_OUT_INCLUDE_PORT, port))
		return COUNT_BYPASS_NOT_INCLUDED;
	return -1;
}

/* What is to become of it, a COUNT_*. With BALANCED, `to` is the endpoint. */
INLINE int judge(struct bpf_sock_addr *ctx, struct bpf_sock *sk, const struct workload *workload,
		 struct destination *to, int family, int is_query)
{
	__u32 networks, port = NET16(to->port);
	int why;

	if (is_proxy(sk))
		return COUNT_BYPASS_PROXY;
	if (!(workload->flags & FLAG_OUTBOUND))
		return COUNT_BYPASS_DISABLED;
	if (!(workload->flags & (family == 4 ? FLAG_IPV4 : FLAG_IPV6)))
		return COUNT_BYPASS_FAMILY;
	if (is_loopback(to->address))
		return COUNT_BYPASS_LOCAL;
	networks = networks_of(workload, to->address);
	if (networks & NETWORK_OWN)
		return COUNT_BYPASS_LOCAL;
	if (is_link_local(to->address))
		return COUNT_BYPASS_LINK_LOCAL;
	why = out_of_scope(workload, networks, port);
	if (why >= 0)
		return why;
	if (workload->flags & FLAG_BALANCE && !is_query) {
		enum verdict verdict = balance(workload, to);

		if (verdict != PASS)
			return verdict == REFUSE ? COUNT_REFUSED_NO_ENDPOINT : COUNT_BALANCED;
	}
	/* Such a socket can't reach loopback: its connection would time out. */
	if (sk->bound_dev_if)
		return COUNT_BYPASS_DEVICE;
	if (is_listening(ctx, workload, family, listener_of(workload, port), is_query))
		return is_query ? COUNT_QUERIES : COUNT_STEERED;
	return workload->flags & FLAG_CLOSED ? COUNT_REFUSED_NO_LISTENER : COUNT_DIRECT_NO_LISTENER;
}

INLINE __u16 kind_of(int what, enum deed deed)
{
	switch (what) {
	case COUNT_STEERED:
		return KIND_STEERED;
	case COUNT_BALANCED:
		return KIND_BALANCED;
	case COUNT_QUERIES:
		return deed == CONNECTS ? KIND_STEERED : KIND_QUERIED;
	}
	return KIND_NONE;
}

/* `to` is where the application wants to go, and on ELSEWHERE where it goes. */
INLINE enum verdict decide(struct bpf_sock_addr *ctx, struct destination *to, enum deed deed)
{
	/* Read once: LLVM would keep the address of the field, which the verifier refuses. */
	struct bpf_sock *sk = ctx->sk;
	struct workload *workload;
	struct destination asked = *to;
	int is_query = ctx->type == SOCK_DGRAM_TYPE && ctx->protocol == PROTOCOL_UDP;
	int family = is_mapped(to->address) ? 4 : 6, what;

	if (is_query) {
		if (deed == SENDS && to->port != NET16(PORT_OF_NAMES))
			return PASS;
	} else if (ctx->type != SOCK_STREAM_TYPE || (ctx->protocol != PROTOCOL_TCP && ctx->protocol != PROTOCOL_MPTCP)) {
		return PASS;
	}
	workload = workload_of(ctx);
	if (!workload)
		return PASS;
	if (is_query && (to->port != NET16(PORT_OF_NAMES) || !workload->dns_port)) {
		if (deed == CONNECTS)
			remember(sk, &asked);
		return PASS;
	}
	what = judge(ctx, sk, workload, to, family, is_query);
	asked.kind = kind_of(what, deed);
	/* Nobody could be told where it was to go. With BALANCED, getpeername() tells the endpoint, which harms nobody. */
	if ((asked.kind || deed == CONNECTS) && !remember(sk, &asked) && what != COUNT_BALANCED)
		what = workload->flags & FLAG_CLOSED ? COUNT_REFUSED_NO_LISTENER : COUNT_DIRECT_NO_LISTENER;
	count(workload->id, what);
	switch (what) {
	case COUNT_REFUSED_NO_ENDPOINT:
	case COUNT_REFUSED_NO_LISTENER:
		fail_with(-CONNECTION_REFUSED);
		return REFUSE;
	case COUNT_BALANCED:
		return ELSEWHERE;
	case COUNT_STEERED:
	case COUNT_QUERIES:
		break;
	default:
		return PASS;
	}
	to->port = NET16(listener_of(workload, NET16(to->port)));
	if (family == 4) {
		to->address[3] = workload->listen4;
	} else {
#pragma unroll
		for (int i = 0; i < 4; i++)
			to->address[i] = workload->listen6[i];
	}
	return ELSEWHERE;
}

/* The hooks of IPv4 and IPv6 sockets; the latter may go to IPv4 addresses in mapped form. */

INLINE int redirected4(struct bpf_sock_addr *ctx, enum deed deed)
{
	struct destination to = {
		.address = {0, 0, MAPPED, WORD(ctx->user_ip4)},
		.port = (__u16)WORD(ctx->user_port),
	};
	enum verdict verdict = decide(ctx, &to, deed);

	if (verdict == ELSEWHERE)
		put4(ctx, &to);
	return verdict != REFUSE;
}

INLINE int redirected6(struct bpf_sock_addr *ctx, enum deed deed)
{
	struct destination to = {
		.address = {WORD(ctx->user_ip6[0]), WORD(ctx->user_ip6[1]), WORD(ctx->user_ip6[2]),
			    WORD(ctx->user_ip6[3])},
		.port = (__u16)WORD(ctx->user_port),
	};
	enum verdict verdict = decide(ctx, &to, deed);

	if (verdict == ELSEWHERE)
		put6(ctx, &to);
	return verdict != REFUSE;
}
