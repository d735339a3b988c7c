/*
 * A connection comes in: which listener gets it. Asked for the first packet only, so connections that exist stay with
 * whom they have.
 *
 * No helper tells the network namespace here, so each namespace has a program of its own, in which the loader has put
 * the cookie in the place of HERE.
 */

INLINE struct workload *workload_at(__u64 here, __u32 port)
{
	struct workload *found = find(MAP(MAP_PODS), &here);
	struct port_key key = {.netns = here, .port = port};
	__u64 *cgroup;

	if (found)
		return found;
	cgroup = find(MAP(MAP_PORTS), &key);
	return cgroup ? find(MAP(MAP_CGROUPS), cgroup) : NULL;
}

INLINE int counted(const struct workload *workload, __u32 what, int verdict)
{
	count(workload->id, what);
	return verdict;
}

int sk_lookup(struct bpf_sk_lookup *ctx)
{
	__u64 here = HERE;
	__u32 own[4] = {}, client[4] = {}, port = ctx->local_port, networks, hash;
	int family = ctx->family == FAMILY_INET ? 4 : 6;
	struct flow_key leg = {.netns = here};
	struct slot_key slot = {.family = family};
	struct workload *workload;

	/* The connect hooks look for the proxy's listener without any interface: on loopback, and so passed below. */
	if (ctx->protocol != PROTOCOL_TCP || ctx->ingress_ifindex == LOOPBACK_INTERFACE)
		return SK_PASS;
	workload = workload_at(here, port);
	if (!workload)
		return SK_PASS;
	if (family == 4) {
		own[2] = client[2] = MAPPED;
		own[3] = WORD(ctx->local_ip4);
		client[3] = WORD(ctx->remote_ip4);
	} else {
		own[0] = WORD(ctx->local_ip6[0]);
		own[1] = WORD(ctx->local_ip6[1]);
		own[2] = WORD(ctx->local_ip6[2]);
		own[3] = WORD(ctx->local_ip6[3]);
		client[0] = WORD(ctx->remote_ip6[0]);
		client[1] = WORD(ctx->remote_ip6[1]);
		client[2] = WORD(ctx->remote_ip6[2]);
		client[3] = WORD(ctx->remote_ip6[3]);
	}
	if (is_loopback(own))
		return SK_PASS;
	leg.port = (__u16)ctx->remote_port;
#pragma unroll
	for (int i = 0; i < 4; i++)
		leg.address[i] = client[i];
	if (find(MAP(MAP_LEGS), &leg))
		return counted(workload, COUNT_INBOUND_LOCAL, SK_PASS);
	if (!(workload->flags & FLAG_INBOUND))
		return counted(workload, COUNT_INBOUND_DISABLED, SK_PASS);
	if (!(workload->flags & (family == 4 ? FLAG_IPV4 : FLAG_IPV6)))
		return counted(workload, COUNT_INBOUND_FAMILY, SK_PASS);
	networks = networks_of(workload, client);
	if (networks & NETWORK_IN_EXCLUDE)
		return counted(workload, COUNT_INBOUND_EXCLUDED, SK_PASS);
	if (workload->flags & FLAG_IN_EXCLUDE_PORTS && is_listed(workload, VALUE_IN_EXCLUDE_PORT, port))
		return counted(workload, COUNT_INBOUND_EXCLUDED, SK_PASS);
	if (workload->flags & FLAG_IN_INCLUDE_PORTS && !is_listed(workload, VALUE_IN_INCLUDE_PORT, port))
		return counted(workload, COUNT_INBOUND_NOT_INCLUDED, SK_PASS);

	slot.id = workload->id;
	hash = (client[0] ^ client[1] ^ client[2] ^ client[3] ^ leg.port) * 0x9e3779b1U >> 16;
	for (__u32 i = 0; i < MAX_WORKERS; i++) {
		struct bpf_sock *sk;
		long failed;

		if (i >= workload->workers)
			break;
		slot.worker = (hash + i) % workload->workers;
		sk = find(MAP(MAP_LISTENERS), &slot);
		if (!sk)
			continue;
		failed = assign(ctx, sk, BPF_SK_LOOKUP_F_NO_REUSEPORT);
		release(sk);
		if (!failed)
			return counted(workload, COUNT_INBOUND_STEERED, SK_PASS);
		if (failed == -SOCKET_EXISTS)
			return SK_PASS; /* a program before this one has decided */
	}
	if (workload->flags & FLAG_CLOSED)
		return counted(workload, COUNT_INBOUND_REFUSED, SK_DROP);
	return counted(workload, COUNT_INBOUND_DIRECT_NO_LISTENER, SK_PASS);
}
