/* bcc's helpers.h demands it. */
#define CONFIG_BPF_SYSCALL 1
