"""`python without_bpf.py COMMAND...`: it and all that it starts are refused bpf(2), as in a container."""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import sys

_NUMBER = {"x86_64": 321, "aarch64": 280}
_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER = 22, 2
_LOAD, _EQUAL, _RETURN = 0x20, 0x15, 0x06  # linux/bpf_common.h: LD|W|ABS, JMP|JEQ|K, RET|K
_ALLOW, _ERRNO = 0x7FFF0000, 0x00050000  # linux/seccomp.h


class Instruction(ctypes.Structure):
    """`struct sock_filter`."""

    _fields_ = (("code", ctypes.c_uint16), ("jt", ctypes.c_uint8), ("jf", ctypes.c_uint8), ("k", ctypes.c_uint32))


class Program(ctypes.Structure):
    """`struct sock_fprog`."""

    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.POINTER(Instruction)))


def refuse() -> None:
    """OSError."""
    filters = (Instruction * 4)(
        Instruction(_LOAD, 0, 0, 0),  # the number of the call
        Instruction(_EQUAL, 0, 1, _NUMBER[platform.machine()]),
        Instruction(_RETURN, 0, 0, _ERRNO | errno.EPERM),
        Instruction(_RETURN, 0, 0, _ALLOW),
    )
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.byref(Program(len(filters), filters)), 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_SECCOMP)")


if __name__ == "__main__":
    refuse()
    os.execvp(sys.argv[1], sys.argv[1:])
