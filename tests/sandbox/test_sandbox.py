"""Programs that try to get out, one by one; each is stopped, and its verdict says why."""

import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from preceptor import sandbox as package
from preceptor.errors import UserError
from preceptor.sandbox import (
    Program,
    Reason,
    Sandbox,
    SandboxLimits,
    Verdict,
    describe,
    lacking,
    read_tests,
    sandbox_layers,
)
from preceptor.sandbox.syscalls import ALLOWED, FORBIDDEN, forbidden, numbers
from preceptor.sandbox.values import decode, encode, equal
from preceptor.sandbox.verdicts import conclude

AVAILABLE = "refused" not in sandbox_layers()
needs_isolation = pytest.mark.skipif(not AVAILABLE, reason="this kernel offers no isolation of files or network")
SECRET = "the secret that lies outside"
ROOMY = SandboxLimits(processor=5, wall=60)  # for what ends by itself, also on a busy machine


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    with Sandbox(ROOMY, workers=1) as opened:
        yield opened


@pytest.fixture(scope="module")
def hasty() -> Iterator[Sandbox]:
    with Sandbox(SandboxLimits(processor=5, wall=1.0), workers=1) as opened:
        yield opened


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    path = tmp_path / "secret.txt"
    path.write_text(SECRET)
    path.chmod(0o644)
    return path


def judged(sandbox: Sandbox, source: str, tests: str = "f(1) == 1") -> Verdict:
    return sandbox.judge([Program(textwrap.dedent(source), tests)])[0]


@needs_isolation
def test_right_and_wrong_programs(sandbox: Sandbox) -> None:
    tests = "f(2, 3) == 5\nassert f(-1, 1) == 0"
    assert judged(sandbox, "def f(a, b): return a + b", tests).passed
    wrong = judged(sandbox, "def f(a, b): return a + abs(b) + (a < 0)", tests)
    assert wrong.reason is Reason.FAILED
    assert (wrong.right, wrong.tests) == (1, 2)
    assert wrong.detail == "f(-1, 1) gave 1, not 0"
    assert str(wrong) == "failed a test: f(-1, 1) gave 1, not 0"


@needs_isolation
def test_an_exception_is_told_with_its_line(sandbox: Sandbox) -> None:
    raised = judged(sandbox, "def g(x):\n    return 1 / x\n\ndef f(x):\n    return g(x - 1)\n")
    assert raised.reason is Reason.EXCEPTION
    assert raised.detail == "line 2: ZeroDivisionError: division by zero"
    broken = judged(sandbox, "def f(x):\n    return (\n")
    assert broken.reason is Reason.EXCEPTION
    assert broken.detail.startswith("line 2: SyntaxError")
    assert "NameError" in judged(sandbox, "def g(x): return x").detail


@needs_isolation
def test_ordinary_programs_run(sandbox: Sandbox) -> None:
    source = """
        import collections, datetime, decimal, hashlib, itertools, json, math, random, re, statistics, textwrap, difflib
        def f(x):
            with open("notes.txt", "w") as file:
                file.write("kept")
            print("a line")
            datetime.datetime.now()
            assert math.comb(4, 2) == 6 and re.match("a", "ab") and random.random() < 1
            return [open("notes.txt").read(), collections.Counter("aab")["a"], {(1, 2): 0.5}, {3}, None, b"\\x00"]
    """
    verdict = judged(sandbox, source, "f(1) == ['kept', 2, {(1, 2): 0.5}, {3}, None, b'\\x00']")
    assert verdict.passed, verdict
    assert verdict.output == "a line\n"


@needs_isolation
def test_the_program_is_a_module_that_annotations_are_looked_up_in(sandbox: Sandbox) -> None:
    source = """
        from __future__ import annotations
        from dataclasses import dataclass
        @dataclass
        class Point:
            x: int
        def f(x):
            return Point(x).x
    """
    assert judged(sandbox, source, "f(5) == 5").passed


@needs_isolation
@pytest.mark.parametrize("shows", ["traceback.print_stack()", "asyncio.run(asyncio.sleep(0))"])
def test_lines_of_the_sandbox_itself_are_no_file_that_a_program_opens(sandbox: Sandbox, shows: str) -> None:
    verdict = judged(sandbox, f"import asyncio, traceback\ndef f(x):\n    {shows}\n    return x", "f(5) == 5")
    assert verdict.reason is not Reason.FILE, verdict


@needs_isolation
def test_nothing_is_left_to_the_next_program(sandbox: Sandbox) -> None:
    writes = """
        import os
        os.umask(0o777)
        os.mkdir("folder")
        def f(x): return open("left.txt", "w").write("x")
    """
    assert judged(sandbox, writes).passed
    assert judged(sandbox, "import os\ndef f(x): return os.listdir('.')", "f(1) == []").passed


# Files


@needs_isolation
@pytest.mark.parametrize(
    "way", ["open(path).read()", "os.read(os.open(path, os.O_RDONLY), 99)", "io.open_code(path).read()"]
)
def test_a_secret_file_outside_is_not_read(sandbox: Sandbox, secret: Path, way: str) -> None:
    verdict = judged(sandbox, f"import io, os\npath = {str(secret)!r}\ndef f(x): return {way}")
    assert verdict.reason is Reason.FILE
    assert verdict.detail == str(secret)
    assert SECRET not in str(verdict) + verdict.output


@needs_isolation
def test_a_secret_file_is_not_read_by_a_relative_path(sandbox: Sandbox, secret: Path) -> None:
    verdict = judged(sandbox, f"def f(x): return open('../../../..{secret}').read()")
    assert verdict.reason is Reason.FILE


@needs_isolation
def test_catching_the_error_does_not_hide_the_try(sandbox: Sandbox, secret: Path) -> None:
    verdict = judged(sandbox, f"try:\n    open({str(secret)!r})\nexcept BaseException:\n    pass\ndef f(x): return x")
    assert verdict.reason is Reason.FILE


@needs_isolation
@pytest.mark.parametrize("path", ["/proc/self/environ", "/proc/1/mem", "/etc/passwd", "/etc/hostname", "/"])
def test_the_machine_is_not_read(sandbox: Sandbox, path: str) -> None:
    read = f"os.listdir({path!r})" if path == "/" else f"open({path!r}, 'rb').read()"
    assert judged(sandbox, f"import os\ndef f(x): return {read}").reason is Reason.FILE


@needs_isolation
def test_nothing_is_written_outside(sandbox: Sandbox, tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    target = tmp_path / "planted.txt"
    assert judged(sandbox, f"def f(x): return open({str(target)!r}, 'w').write('x')").reason is Reason.FILE
    moved = f"import os\nopen('a', 'w').write('x')\nos.rename('a', {str(target)!r})"
    assert judged(sandbox, moved).reason is Reason.EXCEPTION
    assert not target.exists()


@needs_isolation
@pytest.mark.parametrize("call", ["os.unlink(path)", "os.truncate(path, 0)", "os.chmod(path, 0)", "os.utime(path)"])
def test_a_file_outside_is_not_changed(sandbox: Sandbox, secret: Path, call: str) -> None:
    secret.chmod(0o666)
    before = secret.stat()
    verdict = judged(sandbox, f"import os\npath = {str(secret)!r}\ndef f(x): return {call}")
    assert verdict.reason is Reason.EXCEPTION
    assert "PermissionError" in verdict.detail
    assert secret.read_text() == SECRET
    assert secret.stat().st_mode == before.st_mode
    assert secret.stat().st_mtime == before.st_mtime


@needs_isolation
@pytest.mark.parametrize("call", ["symlink", "link"])
def test_no_link_leads_out(sandbox: Sandbox, secret: Path, call: str) -> None:
    source = f"""
        import os
        try:
            os.{call}({str(secret)!r}, "way")
        finally:
            print(open("way").read())
    """
    verdict = judged(sandbox, source)
    assert verdict.reason is Reason.LINK
    assert SECRET not in verdict.output


@needs_isolation
def test_without_a_supervisor_the_kernel_still_keeps_files_closed(secret: Path) -> None:
    with Sandbox(ROOMY, workers=1, without=("notify",)) as sandbox:
        assert judged(sandbox, "def f(x): return x").passed
        read = judged(sandbox, f"def f(x): return open({str(secret)!r}).read()")
        assert (read.reason, "PermissionError" in read.detail) == (Reason.EXCEPTION, True)
        write = judged(sandbox, "def f(x): return open('a', 'w').write('x')")
        assert (write.reason, "PermissionError" in write.detail) == (Reason.EXCEPTION, True)
        assert judged(sandbox, "import os\nos.fork()").reason is Reason.SYSTEM
        assert judged(sandbox, "import socket\nsocket.socket()").reason is Reason.SYSTEM


# Network, processes, signals, the kernel


@needs_isolation
@pytest.mark.parametrize(
    "source",
    [
        "import socket\nsocket.socket()",
        "import socket\nsocket.socketpair()",
        "import socket\nsocket.create_connection(('127.0.0.1', 80))",
        "import urllib.request\nurllib.request.urlopen('http://127.0.0.1/')",
    ],
)
def test_no_socket(sandbox: Sandbox, source: str) -> None:
    assert judged(sandbox, source).reason is Reason.SOCKET


@needs_isolation
def test_without_a_filter_the_network_is_still_empty() -> None:
    with Sandbox(ROOMY, workers=1, without=("filter",)) as sandbox:
        if "namespace" not in sandbox.layers()["network"]:
            pytest.skip("no network namespace is granted here")
        source = """
            import socket
            def f(x):
                try:
                    socket.create_connection(("127.0.0.1", PORT), timeout=5)
                except OSError as error:
                    return "unreachable"
        """
        with __import__("socket").create_server(("127.0.0.1", 0)) as server:
            port = str(server.getsockname()[1])
            assert judged(sandbox, source.replace("PORT", port), "f(1) == 'unreachable'").passed


@needs_isolation
@pytest.mark.parametrize(
    "source",
    [
        "import os\nwhile True:\n    os.fork()",
        "import os\nwhile True:\n    try:\n        os.fork()\n    except OSError:\n        pass",
        "import os\nos.system('true')",
        "import subprocess\nsubprocess.run(['/bin/true'])",
        "import os\nos.execv('/bin/true', ['true'])",
        "import multiprocessing\nmultiprocessing.get_context('fork').Process(target=print).start()",
    ],
)
def test_no_process(sandbox: Sandbox, source: str) -> None:
    assert judged(sandbox, source).reason is Reason.PROCESS


@needs_isolation
def test_no_thread(sandbox: Sandbox) -> None:
    assert judged(sandbox, "import threading\nthreading.Thread(target=print).start()").reason is Reason.THREAD


@needs_isolation
@pytest.mark.parametrize("target", ["os.getppid()", "-1", "0", "1"])
def test_nobody_is_killed(sandbox: Sandbox, target: str) -> None:
    assert judged(sandbox, f"import os\nos.kill({target}, 9)").reason is Reason.SIGNAL
    assert judged(sandbox, "def f(x): return x").passed


SYSTEM_CALLS = {
    "socket": Reason.SOCKET, "clone3": Reason.PROCESS, "execve": Reason.PROCESS, "ptrace": Reason.TRACE,
    "process_vm_readv": Reason.TRACE, "unshare": Reason.SYSTEM, "mount": Reason.SYSTEM, "bpf": Reason.SYSTEM,
    "io_uring_setup": Reason.SYSTEM, "setns": Reason.SYSTEM, "tkill": Reason.SIGNAL, "pidfd_open": Reason.SIGNAL,
}  # fmt: skip


@needs_isolation
@pytest.mark.parametrize("name", SYSTEM_CALLS)
def test_a_system_call_by_its_number(sandbox: Sandbox, name: str) -> None:
    """Through ctypes, past everything that Python could check."""
    number = numbers(os.uname().machine)[name]
    verdict = judged(
        sandbox, f"import ctypes\nctypes.CDLL(None).syscall({number}, 0, 0, 0, 0, 0, 0)\ndef f(x): return x"
    )
    assert verdict.reason is SYSTEM_CALLS[name]
    assert verdict.detail == name


@needs_isolation
@pytest.mark.skipif(os.uname().machine != "x86_64", reason="x86-64 alone has a second table")
def test_a_system_call_of_the_other_table_ends_the_program(sandbox: Sandbox) -> None:
    verdict = judged(sandbox, "import ctypes\nctypes.CDLL(None).syscall(0x40000000 + 41, 2, 1, 0)")
    assert verdict.reason is Reason.SYSTEM


@needs_isolation
@pytest.mark.parametrize(
    "call",
    [
        "resource.setrlimit(resource.RLIMIT_AS, (1 << 40, 1 << 40))",
        "os.memfd_create('m')",
        "os.setuid(0)",
        "os.mkfifo('f')",
        "fcntl.fcntl(1, fcntl.F_SETOWN, os.getppid())",
        "os.chdir('/')",
    ],
)
def test_other_requests_are_refused(sandbox: Sandbox, call: str) -> None:
    verdict = judged(sandbox, f"import fcntl, os, resource\ndef f(x): return {call}")
    assert verdict.reason is Reason.EXCEPTION
    assert "not permitted" in verdict.detail or "not allowed to raise" in verdict.detail


@needs_isolation
def test_the_environment_and_the_descriptors_are_empty(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRECEPTOR_TEST_KEY", SECRET)
    source = """
        import os
        def f(x):
            held = []
            for descriptor in range(64):
                try:
                    os.fstat(descriptor)
                    held.append(descriptor)
                except OSError:
                    pass
            return [dict(os.environ), len(held)]
    """
    with Sandbox(ROOMY, workers=1) as fresh:
        assert judged(fresh, source, "f(1) == [{}, 4]").passed  # input, output, errors, results


@needs_isolation
def test_no_site_packages(sandbox: Sandbox) -> None:
    assert "ModuleNotFoundError" in judged(sandbox, "import numpy").detail


# SandboxLimits


@needs_isolation
def test_memory(sandbox: Sandbox) -> None:
    assert judged(sandbox, "held = []\nwhile True:\n    held.append(bytearray(1 << 20))").reason is Reason.MEMORY
    assert judged(sandbox, "def f(x): return 'x' * (1 << 30)").reason is Reason.MEMORY


@needs_isolation
def test_memory_beyond_the_limit_is_never_held(sandbox: Sandbox) -> None:
    source = """
        held = []
        try:
            while True:
                held.append(bytearray(1 << 20))
        except MemoryError:
            count = len(held)
            del held[:]
        def f(x): return count < 256
    """
    assert judged(sandbox, source, "f(1) == True").passed


@needs_isolation
def test_disk(sandbox: Sandbox) -> None:
    one = "with open('a', 'wb') as file:\n    while True:\n        file.write(bytes(1 << 16))"
    verdict = judged(sandbox, one)
    assert verdict.reason is Reason.DISK
    assert "1048576 bytes" in verdict.detail
    many = "for number in range(10**6):\n    open(f'{number}', 'wb').write(bytes(1000))"
    assert judged(sandbox, many).reason is Reason.DISK
    folders = "import os\nfor number in range(10**6):\n    os.mkdir(f'{number}')"
    assert judged(sandbox, folders).reason is Reason.DISK


@needs_isolation
def test_sleeping(hasty: Sandbox) -> None:
    verdict = judged(hasty, "import time\ntime.sleep(10**6)")
    assert verdict.reason is Reason.TIME
    assert verdict.detail == "it ran for more than 1 s"
    assert judged(hasty, "import os, signal\nos.kill(os.getpid(), signal.SIGSTOP)").reason is Reason.TIME
    assert judged(hasty, "def f(x): return x").passed


@needs_isolation
def test_an_endless_loop_that_ignores_the_kernels_warning() -> None:
    with Sandbox(SandboxLimits(processor=1, wall=60), workers=1) as sandbox:
        assert str(judged(sandbox, "while True: pass")) == "ran out of time: of the processor"
        ignoring = "import signal\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True: pass"
        assert str(judged(sandbox, ignoring)) == "ran out of time: of the processor"


@needs_isolation
def test_output(sandbox: Sandbox) -> None:
    verdict = judged(sandbox, "while True: print('x' * 1000)")
    assert verdict.reason is Reason.OUTPUT
    assert len(verdict.output) <= 2000
    assert judged(sandbox, "def f(x): return 'x' * (1 << 22)").reason is Reason.OUTPUT


@needs_isolation
def test_deep_recursion(sandbox: Sandbox) -> None:
    verdict = judged(sandbox, "def f(x): return f(x) + 1")
    assert verdict.reason is Reason.EXCEPTION
    assert "RecursionError" in verdict.detail
    with Sandbox(SandboxLimits(processor=1, wall=60), workers=1) as brief:
        deeper = judged(brief, "import sys\nsys.setrecursionlimit(10**9)\ndef f(x): return f(x) + 1")
    assert deeper.reason in (Reason.MEMORY, Reason.CRASH, Reason.TIME)
    nested = judged(
        sandbox, "def f(x):\n    value = []\n    for _ in range(10**5):\n        value = [value]\n    return value"
    )
    assert nested.reason is Reason.EXCEPTION


# Forgery


@needs_isolation
@pytest.mark.parametrize(
    ("source", "status"),
    [("import os\nos._exit(0)", "0 of 1"), ("import sys\nsys.exit(0)", "SystemExit"), ("exit()", "NameError")],
)
def test_ending_early_is_not_passing(sandbox: Sandbox, source: str, status: str) -> None:
    verdict = judged(sandbox, source)
    assert not verdict.passed
    assert status in verdict.detail
    inside = judged(sandbox, "import os\ndef f(x): os._exit(0)")
    assert (inside.reason, inside.right) == (Reason.EXIT, 0)


@needs_isolation
def test_printing_a_verdict_forges_nothing(sandbox: Sandbox) -> None:
    verdict = judged(sandbox, 'print("passed")\nprint(\'{"value": {"int": "0x1"}}\')\ndef f(x): return 2')
    assert verdict.reason is Reason.FAILED


@needs_isolation
def test_writing_to_every_descriptor_forges_only_values(sandbox: Sandbox) -> None:
    """What the program writes where its results go is compared like any other value, and the expected is not there."""
    source = """
        import json, os
        for descriptor in range(3, 64):
            for line in (b'{"value": true}', b'passed', b'{"passed": true}', b'{"value": {"int": "0x"}}', b'[1]'):
                try:
                    os.write(descriptor, line + b"\\n")
                except OSError:
                    pass
        os._exit(0)
    """
    verdict = judged(sandbox, source, "f(1) == 41\nf(2) == 42\nf(3) == 43")
    assert not verdict.passed
    assert verdict.right == 0


@needs_isolation
@pytest.mark.parametrize(
    "source",
    [
        "class Same:\n    def __eq__(self, other): return True\n    __hash__ = None\ndef f(x): return Same()",
        "class Same(int):\n    def __eq__(self, other): return True\n    __hash__ = None\ndef f(x): return Same()",
        "class Same(list):\n    def __eq__(self, other): return True\ndef f(x): return Same()",
    ],
)
def test_values_that_equal_everything_equal_nothing(sandbox: Sandbox, source: str) -> None:
    verdict = judged(sandbox, source)
    assert verdict.reason is Reason.EXCEPTION
    assert "no plain value" in verdict.detail


@needs_isolation
def test_redefining_everything_forges_nothing(sandbox: Sandbox) -> None:
    source = """
        import builtins, json, operator, sys
        for module in list(sys.modules.values()):
            for name in ("equal", "conclude", "compare", "encode", "dumps"):
                if hasattr(module, name):
                    setattr(module, name, lambda *_, **__: {"passed": True, "value": True})
        builtins.all = builtins.any = builtins.isinstance = lambda *_: True
        operator.eq = lambda *_: True
        def f(x): return 2
    """
    assert not judged(sandbox, source).passed


@needs_isolation
def test_what_is_expected_is_not_in_the_programs_process(sandbox: Sandbox) -> None:
    """Frames and every object that the collector knows are searched for the value that is expected."""
    source = """
        import gc, sys
        def f(x):
            found, frame = [], sys._getframe()
            while frame is not None:
                found.append(repr(frame.f_locals))
                frame = frame.f_back
            gc.unfreeze()
            found += [repr(one) for one in gc.get_objects() if isinstance(one, (dict, list, tuple))]
            needle = "-".join(("un", "guess", "able"))
            return [needle in text for text in found].count(True) - [repr(needle)].count("") > 3
    """
    verdict = judged(sandbox, source, "f(1) == 'un-guess-able'")
    assert verdict.reason is Reason.FAILED
    assert "gave False" in verdict.detail


# The judge's side


def test_tests_are_read() -> None:
    (one, two) = read_tests("f(2)[0] == [1, {'a': (2.5, None)}]\n\n  assert sorted(f(3)) == [-1, 2]\n")
    assert (one.call, one.expected) == ("f(2)[0]", [1, {"a": (2.5, None)}])
    assert two.call == "sorted(f(3))"
    for line in (
        "f(2)",
        "f(2) < 3",
        "f(2) == g(2)",
        "(f(2) > 1) == True",
        "f(2) == 1 == 1",
        "x == 1",
        "import os",
        "f((",
    ):
        with pytest.raises(UserError, match="cannot be read"):
            read_tests(line)
    with pytest.raises(UserError, match="has no test"):
        read_tests(" \n")
    with pytest.raises(UserError, match="cannot be read"):
        read_tests("f(1) == " + "(" * 3000)


@pytest.mark.parametrize(
    "value",
    [0, -(10**5000), True, None, "\ud800", 1.5, b"a", [1, [()]], {"a": {1: (2,)}}, {3}],
    ids=lambda value: type(value).__name__,
)
def test_values_come_back_as_they_were(value: object) -> None:
    import json

    back = decode(json.loads(json.dumps(encode(value))))
    assert type(back) is type(value)
    assert equal(value, back)


def test_equality_is_exact_but_for_floats() -> None:
    assert equal(0.3, 0.1 + 0.2)
    assert equal(2, 2.0)
    assert not equal(1, True)
    assert not equal([1], (1,))
    assert not equal(float("nan"), float("nan"))
    assert not equal(10**400, 1.5)
    assert not equal({"a": 1}, {"a": 2})
    assert equal([float("inf")], [float("inf")])


@pytest.mark.parametrize(
    "line",
    ["", "null", "1", "[]", "{", '{"value": {"int": 5}}', '{"value": {"no": 1}}', '{"value": {"set": [[1]]}}',
     "[" * 99999, '{"value": ' + "9" * 99999 + "}", '{"value": {"dict": [[1]]}}', '{"error": 1}',
     '{"value": {"float": "x"}}'],
    ids=lambda line: line[:20],
)  # fmt: skip
def test_whatever_a_program_writes_the_judge_reads_on(line: str) -> None:
    told = {"results": f"{line}\n", "why": "", "detail": "", "status": 0, "seconds": 0.0, "output": ""}
    assert not conclude(told, read_tests("f(1) == 1")).passed


def test_without_isolation_nothing_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(package.sys, "platform", "darwin")
    with pytest.raises(UserError, match="on Linux only"):
        Sandbox(workers=1).judge([Program("def f(x): return x", "f(1) == 1")])
    assert "Linux" in sandbox_layers()["refused"]


@pytest.mark.skipif(sys.platform != "linux", reason="Linux only")
def test_lacking_layers_refuse_unless_allowed(secret: Path) -> None:
    program = Program(f"def f(x): return open({str(secret)!r}).read()", f"f(1) == {SECRET!r}")
    with (
        Sandbox(ROOMY, workers=1, without=("landlock",)) as sandbox,
        pytest.raises(UserError, match="no isolation of files .* allow_weak"),
    ):
        sandbox.judge([program])
    without = ("landlock", "filter", "notify", "namespaces")
    with Sandbox(ROOMY, workers=1, without=without, allow_weak=True) as weak:
        assert weak.layers()["files"] == "NOT ISOLATED"
        if os.geteuid() != 0:
            assert weak.judge([program])[0].passed  # the control: what the layers above keep from programs
        assert weak.judge([Program("def f(x): return x", "f(1) == 1")])[0].passed
    everything = {"landlock": 0, "filter": False, "notify": False, "namespaces": [], "nobody": False, "root": False}
    assert lacking(everything) == ["files", "the network"]
    assert describe(everything)["network"] == "NOT ISOLATED"


@needs_isolation
def test_several_at_a_time_and_in_order() -> None:
    programs = [Program(f"def f(x): return x + {number % 2}", "f(1) == 1") for number in range(6)]
    with Sandbox(ROOMY, workers=2) as sandbox:
        assert [verdict.passed for verdict in sandbox.judge(programs)] == [True, False] * 3
        assert sandbox.judge([]) == []


@needs_isolation
def test_a_lost_worker_is_replaced() -> None:
    with Sandbox(ROOMY, workers=1) as sandbox:
        assert judged(sandbox, "def f(x): return x").passed
        worker = sandbox._idle.queue[0]
        worker.process.kill()
        worker.process.wait()
        assert judged(sandbox, "def f(x): return x").passed
        assert sandbox._idle.queue[0] is not worker
        folder = sandbox._idle.queue[0].folder
    assert not folder.exists()


@needs_isolation
def test_an_interrupted_answer_is_not_taken_for_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    with Sandbox(ROOMY, workers=1) as sandbox:
        assert judged(sandbox, "def f(x): return x").passed
        worker = sandbox._idle.queue[0]

        def interrupted(patience: float) -> dict[str, object]:
            raise KeyboardInterrupt

        monkeypatch.setattr(worker, "_receive", interrupted)
        with pytest.raises(KeyboardInterrupt):
            judged(sandbox, "def f(x): return x")
        assert judged(sandbox, "def f(x): return x + 1").reason is Reason.FAILED


@needs_isolation
def test_root_becomes_nobody_where_nobody_can_read_the_interpreter(secret: Path) -> None:
    python = "/usr/bin/python3"
    if os.geteuid() != 0 or not Path(python).exists():
        pytest.skip("not root, or no system interpreter")
    with Sandbox(ROOMY, workers=1, python=python) as sandbox:
        if sandbox.layers()["user"] != "nobody":
            pytest.skip("nobody cannot read the system interpreter")
        source = (
            "import os\ndef f(x):\n    open('a', 'w').write('x')\n    return [os.getuid(), os.geteuid(), os.getgid()]"
        )
        assert judged(sandbox, source, "f(1) == [65534, 65534, 65534]").passed
        assert judged(sandbox, f"def f(x): return open({str(secret)!r}).read()").reason is Reason.FILE
        assert judged(sandbox, "import os\nos.fork()").reason is Reason.PROCESS
        folder = sandbox._idle.queue[0].folder
    assert not folder.exists()


@needs_isolation
def test_workers_end_with_the_process_that_started_them(tmp_path: Path, root: Path) -> None:
    script = (
        "from preceptor.sandbox import *; import os; s = Sandbox(workers=1);"
        "assert s.judge([Program('def f(x): return x', 'f(1) == 1')])[0].passed;"
        "print(s._idle.queue[0].process.pid, s._idle.queue[0].folder, flush=True); os._exit(0)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=root)
    process, folder = done.stdout.split()
    for _ in range(2000):
        status = Path(f"/proc/{process}/status")
        if not Path(folder).exists() and (not status.exists() or "(zombie)" in status.read_text()):
            return
        __import__("time").sleep(0.01)
    pytest.fail("the worker outlived its parent")


def test_the_tables_of_system_calls_agree() -> None:
    for machine in ("x86_64", "aarch64"):
        table = numbers(machine)
        assert len(set(table.values())) == len(table)
        assert not set(ALLOWED.split()) & {name for names in FORBIDDEN.values() for name in names.split()}
        assert forbidden(machine)[table["socket"]] == "socket"
    assert numbers("x86_64")["execve"] == 59
    assert numbers("aarch64")["execve"] == 221
    assert all(name in numbers("x86_64") for names in FORBIDDEN.values() for name in names.split())
