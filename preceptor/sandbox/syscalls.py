"""System calls: their numbers on x86-64 and aarch64, which a program may make, and what a forbidden one is called.

Lists are words in one string. A call that is in none of them fails with EPERM.
"""

from __future__ import annotations

ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}  # AUDIT_ARCH_*, by platform.machine()


ALLOWED = (
    "read write readv writev pread64 pwrite64 close fstat newfstatat stat lstat lseek mmap mprotect munmap mremap "
    "madvise brk rt_sigaction rt_sigprocmask rt_sigreturn sigaltstack getpid gettid getppid getuid geteuid getgid "
    "getegid getcwd getdents64 clock_gettime clock_getres clock_nanosleep nanosleep gettimeofday time futex exit "
    "exit_group getrandom dup dup2 dup3 poll ppoll select pselect6 uname getrusage times sched_yield "
    "sched_getaffinity set_robust_list set_tid_address rseq restart_syscall readlink readlinkat access faccessat "
    "faccessat2 ftruncate unlink unlinkat rename renameat renameat2 rmdir statx fsync fdatasync umask "
    "pipe pipe2 sendmsg"
)


"""What computing, importing and writing into the private folder need. No socket can be had, so ``sendmsg``, with which
the process hands over its filter's listener, has nothing to send to afterwards."""


ARGUMENTS = {
    "ioctl": (0x5401, 0x5450, 0x5451),  # TCGETS (is this a terminal?), FIONCLEX, FIOCLEX
    "fcntl": (0, 1, 2, 3, 4, 1030),  # F_DUPFD, F_GETFD, F_SETFD, F_GETFL, F_SETFL, F_DUPFD_CLOEXEC
}


"""Calls that are allowed with these second arguments alone: F_SETOWN, for one, could have signals sent."""


OPENING = ("open", "openat")


MAKING_FOLDERS = ("mkdir", "mkdirat")


SIGNALS = ("kill", "tkill", "tgkill")


FORBIDDEN = {
    "socket": "socket socketpair connect bind listen accept accept4 sendto",
    "process": "fork vfork clone clone3 execve execveat",
    "signal": "kill tkill tgkill rt_sigqueueinfo rt_tgsigqueueinfo pidfd_open pidfd_send_signal",
    "trace": "ptrace process_vm_readv process_vm_writev kcmp pidfd_getfd",
    "link": "symlink symlinkat link linkat",
    "system": (
        "mount umount2 unshare setns pivot_root chroot bpf perf_event_open userfaultfd io_uring_setup init_module "
        "finit_module kexec_load reboot keyctl add_key request_key"
    ),
}


"""What ends a program, by the reason that its verdict gives."""


_X86_64 = (
    "read 0 write 1 open 2 close 3 stat 4 fstat 5 lstat 6 poll 7 lseek 8 mmap 9 mprotect 10 munmap 11 brk 12 "
    "rt_sigaction 13 rt_sigprocmask 14 rt_sigreturn 15 ioctl 16 pread64 17 pwrite64 18 readv 19 writev 20 access 21 "
    "select 23 sched_yield 24 mremap 25 madvise 28 dup 32 dup2 33 nanosleep 35 pipe 22 getpid 39 socket 41 "
    "connect 42 accept 43 sendto 44 sendmsg 46 bind 49 listen 50 socketpair 53 clone 56 fork 57 vfork 58 execve 59 "
    "exit 60 kill 62 uname 63 fcntl 72 fsync 74 fdatasync 75 ftruncate 77 getcwd 79 rename 82 mkdir 83 rmdir 84 "
    "link 86 unlink 87 symlink 88 readlink 89 umask 95 gettimeofday 96 getrusage 98 times 100 ptrace 101 getuid 102 "
    "getgid 104 geteuid 107 getegid 108 getppid 110 capset 126 rt_sigqueueinfo 129 sigaltstack 131 pivot_root 155 "
    "chroot 161 mount 165 umount2 166 reboot 169 init_module 175 gettid 186 tkill 200 time 201 futex 202 "
    "sched_getaffinity 204 getdents64 217 set_tid_address 218 restart_syscall 219 clock_gettime 228 "
    "clock_getres 229 clock_nanosleep 230 exit_group 231 tgkill 234 kexec_load 246 add_key 248 request_key 249 "
    "keyctl 250 openat 257 mkdirat 258 newfstatat 262 unlinkat 263 renameat 264 linkat 265 symlinkat 266 "
    "readlinkat 267 faccessat 269 pselect6 270 ppoll 271 unshare 272 set_robust_list 273 accept4 288 dup3 292 "
    "rt_tgsigqueueinfo 297 perf_event_open 298 pipe2 293 setns 308 process_vm_readv 310 process_vm_writev 311 "
    "kcmp 312 finit_module 313 renameat2 316 seccomp 317 getrandom 318 bpf 321 execveat 322 userfaultfd 323 "
    "statx 332 rseq 334 pidfd_send_signal 424 io_uring_setup 425 pidfd_open 434 clone3 435 pidfd_getfd 438 "
    "faccessat2 439"
)


_AARCH64 = (
    "getcwd 17 dup 23 dup3 24 fcntl 25 ioctl 29 mkdirat 34 unlinkat 35 symlinkat 36 linkat 37 renameat 38 "
    "umount2 39 mount 40 pivot_root 41 ftruncate 46 faccessat 48 chroot 51 openat 56 close 57 pipe2 59 "
    "getdents64 61 lseek 62 read 63 write 64 readv 65 writev 66 pread64 67 pwrite64 68 pselect6 72 ppoll 73 "
    "readlinkat 78 newfstatat 79 fstat 80 fsync 82 fdatasync 83 capset 91 exit 93 exit_group 94 set_tid_address 96 "
    "unshare 97 futex 98 set_robust_list 99 nanosleep 101 kexec_load 104 init_module 105 clock_gettime 113 "
    "clock_getres 114 clock_nanosleep 115 ptrace 117 sched_getaffinity 123 sched_yield 124 restart_syscall 128 "
    "kill 129 tkill 130 tgkill 131 sigaltstack 132 rt_sigaction 134 rt_sigprocmask 135 rt_sigqueueinfo 138 "
    "rt_sigreturn 139 reboot 142 times 153 uname 160 getrusage 165 umask 166 gettimeofday 169 getpid 172 "
    "getppid 173 getuid 174 geteuid 175 getgid 176 getegid 177 gettid 178 socket 198 socketpair 199 bind 200 "
    "listen 201 accept 202 connect 203 sendto 206 sendmsg 211 brk 214 munmap 215 mremap 216 add_key 217 "
    "request_key 218 keyctl 219 clone 220 execve 221 mmap 222 mprotect 226 madvise 233 rt_tgsigqueueinfo 240 "
    "perf_event_open 241 accept4 242 setns 268 process_vm_readv 270 process_vm_writev 271 kcmp 272 finit_module 273 "
    "renameat2 276 seccomp 277 getrandom 278 bpf 280 execveat 281 userfaultfd 282 statx 291 rseq 293 "
    "pidfd_send_signal 424 io_uring_setup 425 pidfd_open 434 clone3 435 pidfd_getfd 438 faccessat2 439"
)


def numbers(machine: str) -> dict[str, int]:
    """The system calls' numbers by name; a name that the machine lacks (aarch64 has no ``open``) is missing."""
    words = {"x86_64": _X86_64, "aarch64": _AARCH64}[machine].split()
    return {name: int(number) for name, number in zip(words[::2], words[1::2])}


def forbidden(machine: str) -> dict[int, str]:
    """The reason that each forbidden system call gives, by its number."""
    table = numbers(machine)
    return {table[name]: reason for reason, names in FORBIDDEN.items() for name in names.split() if name in table}
