/*
 * The helpers that the hooks use, by their numbers in linux/bpf.h, and access to maps.
 *
 * A map is its index in layout.MAPS: the loader puts the descriptor in its place. So bcc is a compiler here and nothing
 * else, and creates no map of its own.
 */

#define INLINE static inline __attribute__((always_inline))
#define MAP(index) ((void *)bpf_pseudo_fd(1, index))

static void *(*find)(void *map, const void *key) = (void *)BPF_FUNC_map_lookup_elem;
static long (*put)(void *map, const void *key, const void *value, __u64 flags) = (void *)BPF_FUNC_map_update_elem;
static long (*drop)(void *map, const void *key) = (void *)BPF_FUNC_map_delete_elem;
static void *(*socket_storage)(void *map, void *sk, void *value, __u64 flags) = (void *)BPF_FUNC_sk_storage_get;
static struct bpf_sock *(*find_listener)(void *ctx, struct bpf_sock_tuple *tuple, __u32 size, __u64 netns,
					 __u64 flags) = (void *)BPF_FUNC_sk_lookup_tcp;
static struct bpf_sock *(*find_receiver)(void *ctx, struct bpf_sock_tuple *tuple, __u32 size, __u64 netns,
					 __u64 flags) = (void *)BPF_FUNC_sk_lookup_udp;
static long (*release)(void *sk) = (void *)BPF_FUNC_sk_release;
static long (*assign)(void *ctx, void *sk, __u64 flags) = (void *)BPF_FUNC_sk_assign;
static __u64 (*netns_cookie)(void *ctx) = (void *)BPF_FUNC_get_netns_cookie;
static __u64 (*own_cgroup)(void) = (void *)BPF_FUNC_get_current_cgroup_id;
static __u64 (*own_ancestor_cgroup)(int level) = (void *)BPF_FUNC_get_current_ancestor_cgroup_id;
static __u64 (*own_user)(void) = (void *)BPF_FUNC_get_current_uid_gid;
static __u32 (*random_number)(void) = (void *)BPF_FUNC_get_prandom_u32;
static long (*fail_with)(int retval) = (void *)BPF_FUNC_set_retval;

#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
#define NET16(x) ((__u16)__builtin_bswap16((__u16)(x)))
#define NET32(x) ((__u32)__builtin_bswap32((__u32)(x)))
#else
#define NET16(x) ((__u16)(x))
#define NET32(x) ((__u32)(x))
#endif

/* A word of the context as one access: LLVM would join two of them into one that the verifier refuses. */
#define WORD(field) (*(volatile __u32 *)&(field))

#define MAPPED NET32(0xffff) /* the third word of ::ffff:a.b.c.d */

enum {
	SOCK_STREAM_TYPE = 1,
	SOCK_DGRAM_TYPE = 2,
	PROTOCOL_TCP = 6,
	PROTOCOL_UDP = 17,
	PROTOCOL_MPTCP = 262,
	FAMILY_INET = 2,
	FAMILY_INET6 = 10,
	STATE_LISTEN = 10,
	LOOPBACK_INTERFACE = 1,
	SOCKET_EXISTS = 17,
	CONNECTION_REFUSED = 111,
	PORT_OF_NAMES = 53,
};

INLINE void count(__u32 id, __u32 what)
{
	struct counters *found = find(MAP(MAP_COUNTERS), &id);

	if (found && what < COUNTERS)
		__sync_fetch_and_add(&found->count[what], 1);
}

INLINE int is_mapped(const __u32 *address)
{
	return address[0] == 0 && address[1] == 0 && address[2] == MAPPED;
}

/* Loopback, and the unspecified address, which connect() takes for loopback. */
INLINE int is_loopback(const __u32 *address)
{
	if (is_mapped(address))
		return address[3] == 0 || (address[3] & NET32(0xff000000)) == NET32(0x7f000000);
	return (address[0] | address[1] | address[2]) == 0 && (address[3] == NET32(1) || address[3] == 0);
}

INLINE int is_link_local(const __u32 *address)
{
	return (address[0] & NET32(0xffc00000)) == NET32(0xfe800000);
}

/* NETWORK_* of the longest prefix, which has those of the shorter ones, too. */
INLINE __u32 networks_of(const struct workload *workload, const __u32 *address)
{
	struct network_key key = {
		.prefixlen = 160,
		.scope = workload->scope,
		.address = {address[0], address[1], address[2], address[3]},
	};
	__u32 *found = find(MAP(MAP_NETWORKS), &key);

	return found ? *found : 0;
}

INLINE int is_listed(const struct workload *workload, __u32 list, __u32 value)
{
	struct value_key key = {.scope = workload->scope, .list = list, .value = value};

	return find(MAP(MAP_VALUES), &key) != NULL;
}

/* What the application is told, or where its socket goes instead. */

INLINE void put4(struct bpf_sock_addr *ctx, const struct destination *to)
{
	WORD(ctx->user_ip4) = to->address[3];
	WORD(ctx->user_port) = to->port;
}

INLINE void put6(struct bpf_sock_addr *ctx, const struct destination *to)
{
	WORD(ctx->user_ip6[0]) = to->address[0];
	WORD(ctx->user_ip6[1]) = to->address[1];
	WORD(ctx->user_ip6[2]) = to->address[2];
	WORD(ctx->user_ip6[3]) = to->address[3];
	WORD(ctx->user_port) = to->port;
}

INLINE struct config *configuration(void)
{
	__u32 only = 0;

	return find(MAP(MAP_CONFIG), &only);
}
