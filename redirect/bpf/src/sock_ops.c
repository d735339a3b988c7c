/*
 * A connection is about to be opened: its source is known and no packet was sent, so the proxy can't accept it before
 * its destination is found here. The same moment tells inbound steering which connections come from inside: a packet
 * to an own address does not arrive by lo, and nothing else in it says so.
 */

int sock_ops(struct bpf_sock_ops *ctx)
{
	struct flow_key key = {};
	__u32 source4, source6[4], target6[4] = {};
	int is_ipv4;
	struct destination *peer;
	struct bpf_sock *sk;
	struct config *config;
	__u8 present = 1;

	if (ctx->op != BPF_SOCK_OPS_TCP_CONNECT_CB)
		return 1;
	sk = ctx->sk;
	if (!sk)
		return 1;
	key.netns = netns_cookie(ctx);
	key.port = NET16(WORD(ctx->local_port));
	/*
	 * In mapped form the local address is there as IPv4 only, yet. A true IPv6 socket has a filler in local_ip4. All is
	 * read before it is chosen from: LLVM would choose between addresses of fields, which the verifier refuses.
	 */
	source4 = WORD(ctx->local_ip4);
	source6[0] = WORD(ctx->local_ip6[0]);
	source6[1] = WORD(ctx->local_ip6[1]);
	source6[2] = WORD(ctx->local_ip6[2]);
	source6[3] = WORD(ctx->local_ip6[3]);
	target6[0] = WORD(ctx->remote_ip6[0]);
	target6[1] = WORD(ctx->remote_ip6[1]);
	target6[2] = WORD(ctx->remote_ip6[2]);
	is_ipv4 = WORD(ctx->family) == FAMILY_INET || is_mapped(target6);
	key.address[0] = is_ipv4 ? 0 : source6[0];
	key.address[1] = is_ipv4 ? 0 : source6[1];
	key.address[2] = is_ipv4 ? MAPPED : source6[2];
	key.address[3] = is_ipv4 ? source4 : source6[3];

	peer = socket_storage(MAP(MAP_PEERS), sk, NULL, 0);
	if (peer && peer->kind == KIND_STEERED) {
		struct destination asked = *peer;

		put(MAP(MAP_FLOWS), &key, &asked, BPF_ANY);
		return 1;
	}
	config = configuration();
	if (!find(MAP(MAP_PODS), &key.netns) && !(config && config->cgroups && config->host_netns == key.netns))
		return 1;
	if (is_loopback(key.address))
		drop(MAP(MAP_FLOWS), &key); /* what an older connection from this port was told */
	else
		put(MAP(MAP_LEGS), &key, &present, BPF_ANY);
	return 1;
}
