/* connect() of an IPv6 socket, which may go to an IPv4 address in mapped form. */

int connect6(struct bpf_sock_addr *ctx)
{
	struct destination to = {
		.address = {WORD(ctx->user_ip6[0]), WORD(ctx->user_ip6[1]), WORD(ctx->user_ip6[2]),
			    WORD(ctx->user_ip6[3])},
		.port = (__u16)WORD(ctx->user_port),
	};
	enum verdict verdict = decide(ctx, &to);

	if (verdict == ELSEWHERE) {
		WORD(ctx->user_ip6[0]) = to.address[0];
		WORD(ctx->user_ip6[1]) = to.address[1];
		WORD(ctx->user_ip6[2]) = to.address[2];
		WORD(ctx->user_ip6[3]) = to.address[3];
		WORD(ctx->user_port) = to.port;
	}
	return verdict != REFUSE;
}
