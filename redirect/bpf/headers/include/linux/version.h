/* Nothing here depends on the kernel's version: bcc only compiles, and the verifier judges. */
#define KERNEL_VERSION(a, b, c) (((a) << 16) + ((b) << 8) + (c))
#define LINUX_VERSION_CODE 0
