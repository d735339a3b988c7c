/*
 * SO_ORIGINAL_DST (SOL_IP, 80) and IP6T_SO_ORIGINAL_DST (SOL_IPV6, 80) of a connection that was steered. Any proxy that
 * knows REDIRECT of netfilter knows them.
 */

struct ipv4_sockaddr {
	__u16 family;
	__u16 port;
	__u32 address;
	__u32 zero[2];
};

struct ipv6_sockaddr {
	__u16 family;
	__u16 port;
	__u32 flow;
	__u32 address[4];
	__u32 scope;
};

/* LLVM would join the stores of two fields of the context into one that the verifier refuses. */
#define ANSWERS(ctx, size)                          \
	do {                                        \
		(ctx)->optlen = (size);             \
		asm volatile("" ::: "memory");      \
		(ctx)->retval = 0;                  \
	} while (0)

int getsockopt(struct bpf_sockopt *ctx)
{
	struct flow_key key = {};
	struct destination *asked;
	struct bpf_sock *sk = ctx->sk;
	int level = ctx->level;

	/*
	 * Of a longer answer only the first page is here, and before Linux 6.5 the call would fail with EFAULT; 0 leaves it
	 * to the kernel. What lists the rules of iptables is such a one.
	 */
	if (ctx->optlen > 4096)
		ctx->optlen = 0;
	if (ctx->optname != 80 || (level != 0 && level != 41) || !sk)
		return 1;
	key.netns = netns_cookie(ctx);
	key.port = sk->dst_port;
	if (sk->family == FAMILY_INET) {
		key.address[2] = MAPPED;
		key.address[3] = sk->dst_ip4;
	} else if (sk->family == FAMILY_INET6) {
		key.address[0] = WORD(sk->dst_ip6[0]);
		key.address[1] = WORD(sk->dst_ip6[1]);
		key.address[2] = WORD(sk->dst_ip6[2]);
		key.address[3] = WORD(sk->dst_ip6[3]);
	} else {
		return 1;
	}
	asked = find(MAP(MAP_FLOWS), &key);
	if (!asked || is_mapped(asked->address) != (level == 0))
		return 1;

	if (level == 0) {
		struct ipv4_sockaddr *answer = ctx->optval;

		if ((void *)(answer + 1) > ctx->optval_end)
			return 1;
		answer->family = FAMILY_INET;
		answer->port = asked->port;
		answer->address = asked->address[3];
		answer->zero[0] = 0;
		answer->zero[1] = 0;
		ANSWERS(ctx, sizeof(*answer));
	} else {
		struct ipv6_sockaddr *answer = ctx->optval;

		if ((void *)(answer + 1) > ctx->optval_end)
			return 1;
		answer->family = FAMILY_INET6;
		answer->port = asked->port;
		answer->flow = 0;
		answer->address[0] = asked->address[0];
		answer->address[1] = asked->address[1];
		answer->address[2] = asked->address[2];
		answer->address[3] = asked->address[3];
		answer->scope = 0;
		ANSWERS(ctx, sizeof(*answer));
	}
	return 1;
}
