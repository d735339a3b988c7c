/*
 * recvfrom(): an answer of the proxy's resolver is from the nameserver that was asked. A socket that asks several at once
 * without being connected sees the latest one in all answers.
 */

INLINE struct destination *answered(struct bpf_sock_addr *ctx, struct workload **workload)
{
	struct destination *peer = socket_storage(MAP(MAP_PEERS), ctx->sk, NULL, 0);

	if (!peer || (peer->kind != KIND_STEERED && peer->kind != KIND_QUERIED))
		return NULL;
	*workload = workload_of(ctx);
	return *workload ? peer : NULL;
}

int recvmsg4(struct bpf_sock_addr *ctx)
{
	struct workload *workload = NULL;
	struct destination *asked = answered(ctx, &workload);

	if (asked && workload && WORD(ctx->user_ip4) == workload->listen4 &&
	    (__u16)WORD(ctx->user_port) == NET16(workload->dns_port))
		put4(ctx, asked);
	return 1;
}

int recvmsg6(struct bpf_sock_addr *ctx)
{
	struct workload *workload = NULL;
	struct destination *asked = answered(ctx, &workload);
	__u32 from[4] = {WORD(ctx->user_ip6[0]), WORD(ctx->user_ip6[1]), WORD(ctx->user_ip6[2]), WORD(ctx->user_ip6[3])};
	__u16 port = (__u16)WORD(ctx->user_port);

	if (!asked || !workload || port != NET16(workload->dns_port))
		return 1;
	if (is_mapped(from) ? from[3] != workload->listen4
			    : from[0] != workload->listen6[0] || from[1] != workload->listen6[1] ||
				      from[2] != workload->listen6[2] || from[3] != workload->listen6[3])
		return 1;
	put6(ctx, asked);
	return 1;
}
