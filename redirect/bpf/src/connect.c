/* connect(): of a stream, and of a datagram socket that asks for names. */

int connect4(struct bpf_sock_addr *ctx)
{
	return redirected4(ctx, CONNECTS);
}

int connect6(struct bpf_sock_addr *ctx)
{
	return redirected6(ctx, CONNECTS);
}
