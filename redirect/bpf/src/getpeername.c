/* The application sees whom it asked for. */

INLINE struct destination *asked_by(struct bpf_sock_addr *ctx)
{
	struct bpf_sock *sk = ctx->sk;
	struct destination *peer = socket_storage(MAP(MAP_PEERS), sk, NULL, 0);
	struct flow_key key = {};

	if (peer)
		return peer->kind == KIND_STEERED || peer->kind == KIND_BALANCED ? peer : NULL;
	if (sk->protocol != PROTOCOL_MPTCP)
		return NULL;
	/* connect() of MPTCP was seen on the socket of its first subflow, which has the same addresses. */
	key.netns = netns_cookie(ctx);
	key.port = NET16(sk->src_port);
	if (sk->family == FAMILY_INET) {
		key.address[2] = MAPPED;
		key.address[3] = sk->src_ip4;
	} else {
		key.address[0] = WORD(sk->src_ip6[0]);
		key.address[1] = WORD(sk->src_ip6[1]);
		key.address[2] = WORD(sk->src_ip6[2]);
		key.address[3] = WORD(sk->src_ip6[3]);
	}
	return find(MAP(MAP_FLOWS), &key);
}

int getpeername4(struct bpf_sock_addr *ctx)
{
	struct destination *asked = asked_by(ctx);

	if (asked)
		put4(ctx, asked);
	return 1;
}

int getpeername6(struct bpf_sock_addr *ctx)
{
	struct destination *asked = asked_by(ctx);

	if (asked)
		put6(ctx, asked);
	return 1;
}
