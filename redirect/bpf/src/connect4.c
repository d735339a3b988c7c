/* connect() of an IPv4 socket. */

int connect4(struct bpf_sock_addr *ctx)
{
	struct destination to = {
		.address = {0, 0, MAPPED, WORD(ctx->user_ip4)},
		.port = (__u16)WORD(ctx->user_port),
	};
	enum verdict verdict = decide(ctx, &to);

	if (verdict == ELSEWHERE) {
		WORD(ctx->user_ip4) = to.address[3];
		WORD(ctx->user_port) = to.port;
	}
	return verdict != REFUSE;
}
