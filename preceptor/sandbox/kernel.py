"""The kernel's own means of confinement, through ctypes: namespaces, capabilities, Landlock and seccomp filters.

Sources: the manual pages seccomp(2), seccomp_unotify(2), landlock(7), user_namespaces(7); linux/seccomp.h, linux/bpf.h.
"""

from __future__ import annotations

import ctypes
import os
import platform
import resource
import struct
from collections.abc import Iterable
from pathlib import Path

from preceptor.sandbox import syscalls

_NEW_USER, _NEW_NET, _NEW_PID, _NEW_IPC, _NEW_UTS = 0x10000000, 0x40000000, 0x20000000, 0x08000000, 0x04000000


_SET_DUMPABLE, _CAPBSET_DROP, _SET_PDEATHSIG, _SET_NO_NEW_PRIVS = 4, 24, 1, 38


_NOBODY = 65534


# Landlock: the rights over files by the ABI that brought them
_READ_FILE, _READ_DIR = 1 << 2, 1 << 3


_WRITE = 1 << 1 | 1 << 4 | 1 << 5 | 1 << 7 | 1 << 8 | 1 << 14  # write, remove, make folders and files, truncate


_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446


# seccomp
_ALLOW, _ERRNO, _NOTIFY, _KILL = 0x7FFF0000, 0x00050000, 0x7FC00000, 0x80000000


_EPERM, _ENOTTY = 1, 25


_LOAD, _JUMP_IF_EQUAL, _JUMP_IF_AT_LEAST, _RETURN = 0x20, 0x15, 0x35, 0x06


_X32 = 0x40000000  # system calls of x86-64's third interface have this bit


RECEIVE, SEND = 0xC0502100, 0xC0182101  # SECCOMP_IOCTL_NOTIF_RECV and _SEND


CONTINUE = 1  # SECCOMP_USER_NOTIF_FLAG_CONTINUE


class _Vector(ctypes.Structure):
    _fields_ = [("base", ctypes.c_void_p), ("length", ctypes.c_size_t)]


class _Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("filter", ctypes.c_void_p)]


class Kernel:
    """The C library's door to the kernel, and the system calls' numbers on this machine.

    Raises:
        OSError: the machine is neither x86-64 nor aarch64.
    """

    def __init__(self) -> None:
        self.machine = platform.machine()
        if self.machine not in syscalls.ARCHITECTURES:
            raise OSError(f"no table of system calls for {self.machine}")
        self.library = ctypes.CDLL(None, use_errno=True)
        self.numbers = syscalls.numbers(self.machine)
        codes = {notify: self._code(notify) for notify in (False, True)}
        self.programs = {key: b"".join(struct.pack("<HBBI", *one) for one in code) for key, code in codes.items()}

    def call(self, number: int, *arguments: object) -> int:
        """A system call.

        Raises:
            OSError: the kernel refuses.
        """
        wide = [ctypes.c_long(one) if isinstance(one, int) else one for one in arguments]
        result = int(self.library.syscall(ctypes.c_long(number), *wide))
        if result < 0:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))
        return result

    def prctl(self, option: int, value: int = 0) -> None:
        """Set an attribute of this process.

        Raises:
            OSError: the kernel refuses.
        """
        if self.library.prctl(option, ctypes.c_ulong(value), 0, 0, 0):
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))

    def die_with_parent(self) -> None:
        """Have this process killed when its parent ends."""
        self.prctl(_SET_PDEATHSIG, 9)

    def unshare(self) -> list[str]:
        """Leave the machine's network, processes and IPC for empty ones; the names of what was left.

        The next child is the first process of the new process namespace.
        """
        spaces = {"network": _NEW_NET, "processes": _NEW_PID, "IPC": _NEW_IPC, "host name": _NEW_UTS}
        user, group = os.geteuid(), os.getegid()
        if user != 0 and self.library.unshare(_NEW_USER) == 0:
            for name, line in (
                ("setgroups", "deny"),
                ("uid_map", f"{user} {user} 1"),
                ("gid_map", f"{group} {group} 1"),
            ):
                Path("/proc/self", name).write_text(line)
        return [name for name, flag in spaces.items() if self.library.unshare(flag) == 0]

    def drop_user(self, folder: Path, library: Iterable[Path]) -> bool:
        """As root, become nobody for good, and own the folder; not where nobody may not read the library."""
        if os.geteuid() != 0:
            return False
        try:
            os.chown(folder, _NOBODY, _NOBODY)
            os.setgroups([])
            os.setresgid(_NOBODY, _NOBODY, _NOBODY)
            os.setresuid(_NOBODY, _NOBODY, 0)
        except OSError:  # a user namespace without that user
            return False
        needed = [folder, *library]
        if all(os.access(one, os.R_OK | os.X_OK, effective_ids=True) for one in needed):
            os.setresuid(_NOBODY, _NOBODY, _NOBODY)
            return True
        os.setresuid(0, 0, 0)
        os.setresgid(0, 0, 0)
        os.chown(folder, 0, 0)
        return False

    def drop_capabilities(self) -> None:
        """Give up every capability, also those that a program could win back by executing another.

        Raises:
            OSError: the kernel refuses.
        """
        for capability in range(64):
            self.library.prctl(_CAPBSET_DROP, ctypes.c_ulong(capability), 0, 0, 0)  # EINVAL past the last one
        header = ctypes.create_string_buffer(struct.pack("<Ii", 0x20080522, 0), 8)
        self.call(self.numbers["capset"], header, ctypes.create_string_buffer(24))
        self.prctl(_SET_NO_NEW_PRIVS, 1)
        self.prctl(_SET_DUMPABLE, 1)  # so that the supervisor, of the same user, may read the paths that are opened

    def landlock_version(self) -> int:
        """The version of Landlock's interface; 0 where there is none."""
        try:
            return self.call(_CREATE_RULESET, None, 0, 1)
        except OSError:
            return 0

    def landlock_rules(self, read: Iterable[Path], listed: Iterable[Path], write: Iterable[Path]) -> int:
        """A ruleset's descriptor: files to read, folders to list, folders to write into; all else is denied.

        Raises:
            OSError: the kernel refuses.
        """
        version = self.landlock_version()
        files = (1 << {1: 13, 2: 14, 3: 15, 4: 15}.get(version, 16)) - 1
        network, scopes = (3 if version >= 4 else 0), (3 if version >= 6 else 0)
        attributes = struct.pack("<QQQ", files, network, scopes)[: 8 if version < 4 else 16 if version < 6 else 24]
        rules = self.call(_CREATE_RULESET, ctypes.create_string_buffer(attributes, len(attributes)), len(attributes), 0)
        for paths, rights in ((read, _READ_FILE | _READ_DIR), (listed, _READ_DIR), (write, _WRITE | 12)):
            for path in paths:
                self._rule(rules, path, rights & files)
        return rules

    def _rule(self, rules: int, path: Path, rights: int) -> None:
        if not path.is_dir():
            rights &= 1 << 1 | 1 << 2 | 1 << 14
        place = os.open(path, os.O_PATH | os.O_CLOEXEC)
        try:
            beneath = ctypes.create_string_buffer(struct.pack("<Qi", rights, place), 12)
            self.call(_ADD_RULE, rules, 1, beneath, 0)
        finally:
            os.close(place)

    def landlock(self, rules: int) -> None:
        """Confine this process and all it starts to a ruleset, for good.

        Raises:
            OSError: the kernel refuses.
        """
        self.call(_RESTRICT_SELF, rules, 0)

    def filter(self, *, notify: bool) -> int:
        """Confine this process to the allowed system calls, for good.

        With ``notify``, every other call waits for a supervisor, who reads of it from the descriptor that is returned.
        Without, forbidden calls kill the process, others fail, and 0 is returned.

        Raises:
            OSError: the kernel refuses.
        """
        program = self.programs[notify]
        instructions = ctypes.create_string_buffer(program, len(program))
        described = _Program(len(program) // 8, ctypes.addressof(instructions))
        return self.call(self.numbers["seccomp"], 1, 8 if notify else 0, ctypes.byref(described))

    def _code(self, notify: bool) -> list[tuple[int, int, int, int]]:
        """The filter as BPF instructions (code, jump if true, jump if false, operand).

        It reads ``seccomp_data``: the number at 0, the architecture at 4, the arguments' low halves from 16 on.
        """
        code = [
            (_LOAD, 0, 0, 4),
            (_JUMP_IF_EQUAL, 1, 0, syscalls.ARCHITECTURES[self.machine]),
            (_RETURN, 0, 0, _KILL),
            (_LOAD, 0, 0, 0),
            (_JUMP_IF_AT_LEAST, 0, 1, _X32),
            (_RETURN, 0, 0, _KILL),
        ]
        opening = [] if notify else [name for name in syscalls.OPENING if name in self.numbers]
        for name in [*syscalls.ALLOWED.split(), *opening]:
            if name in self.numbers:
                code += [(_JUMP_IF_EQUAL, 0, 1, self.numbers[name]), (_RETURN, 0, 0, _ALLOW)]
        for name, values in syscalls.ARGUMENTS.items():
            refusal = _ERRNO | (_ENOTTY if name == "ioctl" else _EPERM)
            code += [(_JUMP_IF_EQUAL, 0, 2 + 2 * len(values), self.numbers[name]), (_LOAD, 0, 0, 24)]
            for value in values:
                code += [(_JUMP_IF_EQUAL, 0, 1, value), (_RETURN, 0, 0, _ALLOW)]
            code += [(_RETURN, 0, 0, refusal)]
        if notify:
            return [*code, (_RETURN, 0, 0, _NOTIFY)]
        for number in syscalls.forbidden(self.machine):
            code += [(_JUMP_IF_EQUAL, 0, 1, number), (_RETURN, 0, 0, _KILL)]
        return [*code, (_RETURN, 0, 0, _ERRNO | _EPERM)]

    def text(self, process: int, address: int) -> str:
        """A string in another process's memory, cut at 8,192 bytes; empty when it cannot be read."""
        start = self.memory(process, address, 4096 - address % 4096)
        if start and b"\0" not in start:
            start += self.memory(process, address + len(start), 4096)
        return start.partition(b"\0")[0].decode("utf-8", "backslashreplace")

    def memory(self, process: int, address: int, length: int) -> bytes:
        """So many bytes of another process's memory, from one page of it; empty when they cannot be read."""
        buffer = ctypes.create_string_buffer(length)
        mine = _Vector(ctypes.addressof(buffer), length)
        theirs = _Vector(address, length)
        arguments = (process, ctypes.byref(mine), 1, ctypes.byref(theirs), 1, 0)
        try:
            count = self.call(self.numbers["process_vm_readv"], *arguments)
        except OSError:
            return b""
        return buffer.raw[:count]


def limit(*, memory: int, processor: float, file: int, descriptors: int) -> None:
    """Set the limits of this process: address space and file size in bytes, processor time in seconds, open files.

    No core is written, and where the user is not root no process can be started.
    """
    seconds = max(1, round(processor))
    for what, soft, hard in (
        (resource.RLIMIT_AS, memory, memory),
        (resource.RLIMIT_CPU, seconds, seconds + 1),
        (resource.RLIMIT_FSIZE, file, file),
        (resource.RLIMIT_NOFILE, descriptors, descriptors),
        (resource.RLIMIT_CORE, 0, 0),
        (resource.RLIMIT_NPROC, 0, 0),
    ):
        resource.setrlimit(what, (soft, hard))
