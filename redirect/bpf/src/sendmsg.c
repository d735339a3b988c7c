/*
 * sendto() of a datagram socket that is not connected: queries for names go to the proxy's resolver. An IPv6 socket that
 * sends to an address in mapped form comes by the hook of IPv4.
 */

int sendmsg4(struct bpf_sock_addr *ctx)
{
	return redirected4(ctx, SENDS);
}

int sendmsg6(struct bpf_sock_addr *ctx)
{
	return redirected6(ctx, SENDS);
}
