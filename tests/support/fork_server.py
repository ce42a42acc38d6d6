"""Programs from a process that has imported what they need: a fork of it begins where a new one imports for a second.

As a program, `python -m tests.support.fork_server SOCKET MODULE…`, it is that process. A request is a JSON object and four
file descriptors: the program's standard streams, and a pipe that is told the program's process id and its exit code.
"""

import atexit
import contextlib
import gc
import importlib
import json
import os
import resource
import runpy
import selectors
import signal
import socket
import subprocess
import sys
import threading
import traceback
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, NoReturn

START_SECONDS = 180
REQUEST_BYTES = 1 << 17
NUMBER_BYTES = 16
FIRST_VARIABLES = tuple(os.environ)


class ForkedProcess:
    """A program that the server has begun; in use as `subprocess.Popen` is, also by several threads."""

    def __init__(self, status: int) -> None:
        self._status = status
        weakref.finalize(self, os.close, status)  # not before: another thread may wait for it
        self._reading = threading.Lock()
        self.returncode: int | None = None
        self._wait_until_told(START_SECONDS)
        self.pid = self._number()

    def poll(self) -> int | None:
        try:
            return self.wait(0)
        except subprocess.TimeoutExpired:
            return None

    def wait(self, timeout: float | None = None) -> int:
        """The exit code, or the negative number of the signal that ended it. Raises subprocess.TimeoutExpired."""
        if self.returncode is None:
            self._wait_until_told(timeout)
            with self._reading:
                self.returncode = self._number() if self.returncode is None else self.returncode
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def _wait_until_told(self, timeout: float | None) -> None:
        with selectors.PollSelector() as selector:
            selector.register(self._status, selectors.EVENT_READ)
            if not selector.select(timeout):
                raise subprocess.TimeoutExpired("a forked program", timeout or 0)

    def _number(self) -> int:
        written = os.read(self._status, NUMBER_BYTES)
        assert written, "the fork server has ended"
        return int(written)


class ForkServer:
    """Starts the process when the first program is wanted. It ends, with all its programs, when this one ends."""

    def __init__(self, *modules: str) -> None:
        self._modules = modules
        self._socket: socket.socket | None = None
        self._lock = threading.Lock()

    def start(
        self,
        module: str,
        arguments: Sequence[str],
        *,
        env: Mapping[str, str],
        cwd: Path,
        stdout: IO[bytes],
        stderr: IO[bytes],
        stdin: IO[bytes] | None = None,
        open_files: tuple[int, int] | None = None,
    ) -> ForkedProcess:
        """Runs a module as `python -m` does; it reads `stdin`, if there is one. Blocks until it has begun.

        `open_files` are the soft and the hard limit of its open files, if not those of this process.
        """
        with self._lock:
            server = self._started(env)
        request = {"arguments": [module, *arguments], "env": dict(env), "cwd": str(cwd), "open_files": open_files}
        status, told = os.pipe()
        with Path(os.devnull).open("rb") as nothing:
            streams = [(stdin or nothing).fileno(), stdout.fileno(), stderr.fileno()]
            socket.send_fds(server, [json.dumps(request).encode()], [*streams, told])
        os.close(told)
        return ForkedProcess(status)

    def _started(self, env: Mapping[str, str]) -> socket.socket:
        if self._socket is None:
            self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            command = [sys.executable, "-m", "tests.support.fork_server", str(theirs.fileno()), *self._modules]
            plain = {**env, "OMP_WAIT_POLICY": "PASSIVE"}  # which the command line sets before torch is imported
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, env=plain, pass_fds=[theirs.fileno()])
            theirs.close()
            atexit.register(self._close, self._socket, process)
        return self._socket

    @staticmethod
    def _close(requests: socket.socket, process: "subprocess.Popen[bytes]") -> None:
        requests.close()
        process.wait()


# In the server


@dataclass
class Server:
    """Forks a program for each request, until the other end of the socket is closed."""

    requests: socket.socket
    running: dict[int, int] = field(default_factory=dict)  # where each process's exit code is written, by its id

    def run(self) -> None:
        awake, wake = socket.socketpair()
        for end in (awake, wake):
            end.setblocking(False)
        signal.set_wakeup_fd(wake.fileno(), warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal; the tests end their programs themselves
        with selectors.DefaultSelector() as selector:
            selector.register(self.requests, selectors.EVENT_READ)
            selector.register(awake, selectors.EVENT_READ)
            while True:
                ready = [key.fileobj for key, _ in selector.select()]
                if awake in ready:
                    awake.recv(4096)
                    self._tell_of_the_ended()
                if self.requests in ready and not self._serve([selector, awake, wake]):
                    break
        for pid in self.running:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)

    def _serve(self, own: Sequence[Any]) -> bool:
        message, descriptors, _, _ = socket.recv_fds(self.requests, REQUEST_BYTES, 4)
        if not message:
            return False
        *streams, told = descriptors
        pid = os.fork()
        if pid == 0:
            for thing in (*own, self.requests):
                thing.close()
            for descriptor in (told, *self.running.values()):
                os.close(descriptor)
            become(json.loads(message), streams)
        for stream in streams:
            os.close(stream)
        self.running[pid] = told
        tell(told, pid)
        return True

    def _tell_of_the_ended(self) -> None:
        for pid in list(self.running):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                told = self.running.pop(pid)
                tell(told, os.waitstatus_to_exitcode(status))
                os.close(told)


def tell(pipe: int, number: int) -> None:
    with contextlib.suppress(BrokenPipeError):  # the test no longer wants to know
        os.write(pipe, str(number).rjust(NUMBER_BYTES).encode())


def become(request: dict[str, Any], streams: Sequence[int]) -> NoReturn:
    """Makes the forked process what `python -m` would have made of a new one, and runs the program."""
    code = 1
    try:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for descriptor, stream in enumerate(streams):
            os.dup2(stream, descriptor)
            os.close(stream)
        for name in FIRST_VARIABLES:
            del os.environ[name]
        os.environ.update(request["env"])  # beside what the imported modules have set for themselves
        os.chdir(request["cwd"])
        if request["open_files"]:
            resource.setrlimit(resource.RLIMIT_NOFILE, tuple(request["open_files"]))
        sys.argv = request["arguments"]
        sys.path[0] = request["cwd"]
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:  # noqa: BLE001 - as the interpreter itself
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    for name in sys.argv[2:]:
        importlib.import_module(name)
    gc.freeze()  # a collection in a program need not look through, and so copy, what was imported
    Server(socket.socket(fileno=int(sys.argv[1]))).run()
