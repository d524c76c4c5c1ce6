"""The kernel's walls around a program, by system calls and for this process alone: network, files, system calls. Linux.

Each function acts on the calling process and cannot be taken back; a child calls them between fork and exec. What they
rest on: namespaces(7), landlock(7), seccomp(2). All of them but a network namespace without a user namespace are open
to an ordinary user.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import platform
import socket
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Final

_LIBC: Final = ctypes.CDLL(None, use_errno=True)
_PR_SET_DUMPABLE: Final = 4  # linux/prctl.h
_CLONE_NEWUSER: Final = 0x10000000  # linux/sched.h
_CLONE_NEWNET: Final = 0x40000000

_PR_SET_NO_NEW_PRIVS: Final = 38


def gain_nothing() -> None:
    """Have no program that this process starts, setuid ones too, gain any right."""
    _call("prctl", _PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)


_PR_CAPBSET_DROP: Final = 24
# What root needs for files that are not its own, and to hold memory: CHOWN, DAC_OVERRIDE, DAC_READ_SEARCH, FOWNER,
# IPC_LOCK (linux/capability.h). The others lead around these walls.
_KEPT_RIGHTS: Final = frozenset({0, 1, 2, 3, 14})


def drop_rights() -> None:
    """Leave a program that root starts the rights to files alone. They are gone with its exec."""
    for right in set(range(64)) - _KEPT_RIGHTS:
        _call("prctl", _PR_CAPBSET_DROP, right, 0, 0, 0)


# --- network --------------------------------------------------------------------------------------------------------

_SIOCGIFFLAGS: Final = 0x8913  # linux/sockios.h
_SIOCSIFFLAGS: Final = 0x8914
_IFF_UP: Final = 1


def leave_network(*, loopback: bool) -> None:
    """Move into a network of this process's own, where nothing is but, for `loopback`, an address to itself.

    Without the right to do so, in a user namespace of its own, which has the same users. Raises OSError.
    """
    if _call("unshare", _CLONE_NEWNET) != 0:
        uid, gid = os.geteuid(), os.getegid()
        _checked(_call("unshare", _CLONE_NEWUSER | _CLONE_NEWNET), "unshare")
        # A process that hides its memory may not write these files. Nothing is executed in between.
        _call("prctl", _PR_SET_DUMPABLE, 1, 0, 0, 0)
        _write("/proc/self/setgroups", "deny")
        _write("/proc/self/uid_map", f"{uid} {uid} 1")
        _write("/proc/self/gid_map", f"{gid} {gid} 1")
        _call("prctl", _PR_SET_DUMPABLE, 0, 0, 0, 0)
    if loopback:
        _raise_loopback()


def _raise_loopback() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        asked = struct.pack("16sH22x", b"lo", 0)
        _, flags = struct.unpack("16sH22x", fcntl.ioctl(any_socket, _SIOCGIFFLAGS, asked))
        fcntl.ioctl(any_socket, _SIOCSIFFLAGS, struct.pack("16sH22x", b"lo", flags | _IFF_UP))


def _write(path: str, text: str) -> None:
    descriptor = os.open(path, os.O_WRONLY)
    try:
        os.write(descriptor, text.encode())
    finally:
        os.close(descriptor)


# --- files (landlock) -----------------------------------------------------------------------------------------------

_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446  # the same number on every architecture
_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR = 1, 2, 4, 8  # linux/landlock.h
_TRUNCATE, _IOCTL_DEVICE = 1 << 14, 1 << 15
# Bits of access by the version of the interface that brought them.
_BITS: Final = {1: 13, 2: 14, 3: 15, 4: 15, 5: 16}
_SCOPES: Final = 3  # abstract sockets and signals of processes outside; since version 6
_ENTER: Final = os.O_PATH | os.O_CLOEXEC
_OF_FILES: Final = _EXECUTE | _WRITE_FILE | _READ_FILE | _TRUNCATE | _IOCTL_DEVICE
READ: Final = _EXECUTE | _READ_FILE | _READ_DIR
DEVICES: Final = READ | _WRITE_FILE | _TRUNCATE | _IOCTL_DEVICE
LIST: Final = _READ_DIR
ALL: Final = ~(1 << 6 | 1 << 11)  # but to make devices


def landlock_version() -> int:
    """The version of Landlock's interface; 0 where the kernel has none, or keeps it from us."""
    return max(0, int(_LIBC.syscall(_CREATE_RULESET, None, ctypes.c_size_t(0), 1)))


def file_rules(rules: Iterable[tuple[Path, int]]) -> int:
    """A descriptor of rules: what is not named may not be opened. Paths that are not there are left out.

    It is made before the fork, and taken by `keep_to` after it. Raises OSError.
    """
    version = landlock_version()
    handled = (1 << _BITS[min(version, 5)]) - 1 if version else 0
    attributes = struct.pack("QQQ", handled, 0, _SCOPES)[: 24 if version >= 6 else 16 if version >= 4 else 8]
    made = _LIBC.syscall(_CREATE_RULESET, attributes, ctypes.c_size_t(len(attributes)), 0)
    _checked(0 if made >= 0 else -1, "landlock_create_ruleset")
    for path, access in rules:
        _allow(made, path, access & handled)
    return int(made)


def _allow(ruleset: int, path: Path, access: int) -> None:
    try:
        place = os.open(path, _ENTER)
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return
    try:
        access &= -1 if path.is_dir() else _OF_FILES
        rule = struct.pack("=Qi", access, place)
        _checked(_LIBC.syscall(_ADD_RULE, ruleset, 1, rule, 0) if access else 0, f"landlock_add_rule({path})")
    finally:
        os.close(place)


def keep_to(ruleset: int) -> None:
    """Open nothing but what the rules allow. Asks for `no_new_privs`. Raises OSError."""
    _checked(_LIBC.syscall(_RESTRICT_SELF, ruleset, 0), "landlock_restrict_self")


# --- system calls (seccomp) -----------------------------------------------------------------------------------------

_ARCHITECTURE: Final = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}  # linux/audit.h
_SECCOMP: Final = {"x86_64": 317, "aarch64": 277}
_SOCKET: Final = {"x86_64": 41, "aarch64": 198}
_CONNECT: Final = {"x86_64": 42, "aarch64": 203}
# What a training has no use for, and holes in kernels are often reached by: others' memory, new namespaces, keys, bpf,
# and io_uring, which makes sockets behind the back of a filter.
_USELESS: Final = {
    "x86_64": (101, 272, 308, 310, 311, 248, 249, 250, 298, 321, 323, 425, 426, 427, 438),
    "aarch64": (117, 97, 268, 270, 271, 217, 218, 219, 241, 280, 282, 425, 426, 427, 438),
}
_SET_FILTER, _ALLOW_SPECULATION = 1, 4  # without the flag, kernels before 5.16 slow the program down
_LOAD, _IF_EQUAL, _IF_GREATER, _RETURN = 0x20, 0x15, 0x35, 0x06
_NUMBER, _ARCH, _FIRST = 0, 4, 16  # offsets in struct seccomp_data
_ALLOW, _KILL, _FAIL = 0x7FFF0000, 0x80000000, 0x00050000
_OTHER_ABI: Final = 0x40000000  # x32


def call_filter(*, sockets: bool, connect: bool) -> bytes | None:
    """A filter for `filter_calls`; None on an architecture that it is not written for. Pure.

    `sockets` False: none but of the family AF_UNIX. `connect` False: no socket reaches anybody by name.
    """
    machine = platform.machine()
    if machine not in _ARCHITECTURE:
        return None
    refused = [(number, errno.ENOSYS if number in {425, 426, 427} else errno.EPERM) for number in _USELESS[machine]]
    if not connect:
        refused.append((_CONNECT[machine], errno.EACCES))
    steps = [
        _step(_LOAD, _ARCH),
        _step(_IF_EQUAL, _ARCHITECTURE[machine], 1, 0),
        _step(_RETURN, _KILL),
        _step(_LOAD, _NUMBER),
        _step(_IF_GREATER, _OTHER_ABI, 0, 1),
        _step(_RETURN, _FAIL | errno.ENOSYS),
    ]
    for number, code in refused:
        steps += [_step(_IF_EQUAL, number, 0, 1), _step(_RETURN, _FAIL | code)]
    if not sockets:
        steps += [
            _step(_IF_EQUAL, _SOCKET[machine], 0, 3),
            _step(_LOAD, _FIRST),
            _step(_IF_EQUAL, socket.AF_UNIX, 1, 0),
            _step(_RETURN, _FAIL | errno.EACCES),
        ]
    return b"".join([*steps, _step(_RETURN, _ALLOW)])


def _step(code: int, operand: int, then: int = 0, otherwise: int = 0) -> bytes:
    return struct.pack("HBBI", code, then, otherwise, operand)


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("steps", ctypes.c_char_p))


def filter_calls(program: bytes) -> None:
    """Have the kernel refuse what `call_filter` names. Asks for `no_new_privs`. Raises OSError."""
    made = _Program(len(program) // 8, program)
    number = _SECCOMP[platform.machine()]
    _checked(_LIBC.syscall(number, _SET_FILTER, ctypes.c_ulong(_ALLOW_SPECULATION), ctypes.byref(made)), "seccomp")


def _call(name: str, *arguments: int) -> int:
    return int(getattr(_LIBC, name)(*(ctypes.c_ulong(argument) for argument in arguments)))


def _checked(answer: int, what: str) -> None:
    if answer != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
