"""Worker that is a child process, driven by a thread of the daemon.

The child is started with exec, not forked: a fork would inherit the daemon's locks in whatever
state its other threads left them, and its sockets. It leads a process group of its own, so a Ctrl-C
on the terminal does not reach it, and it is killed with all processes that it started
(`process_monitor.py`).

Nothing that comes from a child is believed. An answer that does not fit the job, bytes that are no
answer, a connection that ends: the child is killed, the job failed as `crashed`, and the next job
gets a new child. What is found between two jobs costs no job an attempt.

A child has its next jobs before it has answered the last one (`_hand_ahead`): under load the thread
waits for the interpreter longer than a job takes. Invariants:

* A child takes its jobs in order, and answers one before it takes the next. So at most one job is
  begun and not answered, the oldest, and it alone is charged with a crash, a timeout or a kill.
* A job is begun when the child has received its packet. A packet that the daemon receives instead
  (`WorkerProcess.take_back`) was not begun; its job goes back to the front of the queue.
* A job's time begins when it is handed over or when the one before it is answered, whichever is
  later, not while it lies ready.
* Nothing is handed ahead to a child whose last job failed, of slow jobs, or while another worker
  is idle. What lies ready behind a job that is slow for once goes back after `AHEAD_SECONDS`.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import msgspec

from ingestd.base.errors import HandlerLoadError
from ingestd.base.logging import get_logger, lowest_level
from ingestd.execution import process_monitor
from ingestd.execution.pool import START_TIMEOUT, log_findings, not_started
from ingestd.execution.process_monitor import Monitor, Outputs
from ingestd.execution.worker_log import WorkerLog
from ingestd.handlers import wire
from ingestd.handlers.outcome import FINDINGS_MAX, Failure, Result, SinkFinding, flaw_of
from ingestd.handlers.runner import CLOSE_SECONDS
from ingestd.handlers.text import describe
from ingestd.host.process import Surroundings

if TYPE_CHECKING:
    from collections.abc import Callable

    from ingestd.execution.job_queue import JobQueue, QueuedJob
    from ingestd.handlers.outcome import Job

log = get_logger()

T = TypeVar("T")

FAILING_TRIES = 5
FAILING_SECONDS = 10.0
"""A child whose last jobs all raised, so many of them and for so long, is replaced: it may have run
out of descriptors, say. The time doubles with each one that did no better."""
FAILING_SECONDS_MAX = 3600.0
AHEAD_JOBS = 6
"""Jobs that a child has beside the one that it is at, most of the time fewer: they also have to fit
into the shared memory."""
AHEAD_SECONDS = 0.05
"""Work that they are, and after what time without an answer they go back."""
_WEIGHT = 0.2  # of the newest job in the mean duration
_LOOK_SECONDS = 0.001
_SLOW = 2 * AHEAD_SECONDS  # the mean as long as it is not known
_IDLE_SECONDS = 0.01
"""A child that was without a job for so long is looked at before it gets one."""
_PACKETS = getattr(socket, "SOCK_SEQPACKET", socket.SOCK_DGRAM)
_BOOT = (
    # Without an import: the user's folder may be the first place where one is looked for.
    "import sys; sys.path[:] = eval(sys.argv[1]);"
    "from ingestd.handlers.worker import main; main(*map(int, sys.argv[2:]))"
)


class _WorkerDiedError(Exception):
    """The child is gone, or had to be killed."""

    def __init__(self, reason: str, error: str) -> None:
        super().__init__(error)
        self.failure = Failure(reason, error)


_NO_WORKER = (HandlerLoadError, OSError, RuntimeError, MemoryError)
"""What starting a child raises where it is not the child that dies."""


class _Late(Exception):  # noqa: N818
    """Nothing came for as long as it was waited for."""


class _Begun(NamedTuple):
    """A job that the child has, and the part of the shared memory that is its payload's."""

    batch: str
    number: int
    records: int
    start: int
    end: int


class WorkerProcess:
    """One child process. Blocking; used by one thread.

    Args:
        hello: what it is told first.
        name: of its worker.
        surroundings: what it is started with.

    Attributes:
        is_ready: it has loaded the handler.
        is_checking: its findings follow, which `findings` waits for; before the first job.
        is_closing: its handler's call raised, and is not known to be closed yet.
        answers: jobs that it has answered.
        not_begun: jobs that it had and had not begun when it ended.
    """

    def __init__(self, hello: wire.InitMessage, name: str, surroundings: Surroundings) -> None:
        self._mark = process_monitor.new_mark()
        with contextlib.ExitStack() as theirs, contextlib.ExitStack() as ours:
            self._sock, sock = _both(socket.socketpair(), ours, theirs)
            self._packets, unread = _both(socket.socketpair(type=_PACKETS), ours, theirs)
            # Another descriptor of the child's end: what the child has not received comes back.
            self._unread = unread.dup()
            ours.callback(self._unread.close)
            logged, log_sock = _both(socket.socketpair(type=_PACKETS), ours, theirs)
            lifeline, self._lifeline = os.pipe()
            theirs.callback(os.close, lifeline)
            ours.callback(os.close, self._lifeline)
            text, stderr = os.pipe()
            theirs.callback(os.close, stderr)
            ours.callback(os.close, text)
            memory = wire.SharedBuffer.make()
            if memory >= 0:
                theirs.callback(os.close, memory)
            self._slot = wire.SharedBuffer(memory, ours=True)
            ours.callback(self._slot.close)
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, wire.SOCKET_BYTES)
            self._packets.setblocking(False)  # it takes the few that there may be at once
            log_sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, wire.SOCKET_BYTES)
            fds = (log_sock.fileno(), sock.fileno(), unread.fileno(), lifeline, memory)
            self.process = subprocess.Popen(  # noqa: S603
                [sys.executable, "-c", _BOOT, repr(surroundings.path),
                 *map(str, (fds[0], lowest_level(), *fds[1:]))],
                stdin=subprocess.DEVNULL,
                stderr=stderr,
                pass_fds=[fd for fd in fds if fd >= 0],
                cwd=surroundings.folder,
                env={**surroundings.environ, process_monitor.MARK: self._mark},
                umask=surroundings.umask,
                # Not a session: Linux would schedule it apart from the daemon, and each answer
                # would come late on a busy machine.
                process_group=0,
            )  # fmt: skip
            ours.pop_all()
        self._timeout = 0.0
        self._number = 0
        self._jobs: deque[_Begun] = deque()
        self._rest = b""  # of the connection's bytes
        self._deadline = 0.0  # of the answer that is waited for
        self._began = 0.0  # when the oldest job's time began
        self._is_late = False
        self._closing = 0  # the job whose call raised
        self._closed_by = 0.0  # when the handler's close() has to be done
        self._gone = False
        self._answered = time.monotonic()
        self._monitor = Monitor(
            self.process.pid,
            self._sock,
            Outputs(logged, text),
            WorkerLog(hello.handler.pipeline, name),
            name=f"{name}-monitor",
        )
        self._hello = hello
        self.is_ready = self.is_checking = False
        self.is_closing = False
        self.answers = self.not_begun = 0

    def greet(self) -> wire.ReadyMessage:
        """Waits until the child has loaded the handler; comes before the first job.

        Raises:
            HandlerLoadError: the child can't load the handler.
            _WorkerDiedError: it did not come up.
        """
        hello = self._hello
        self._wait_at_most(START_TIMEOUT)
        try:
            self._send(wire.encode(hello))
            body = self._receive(0, START_TIMEOUT, time.monotonic() + START_TIMEOUT)
        except (_Late, BlockingIOError):
            raise self._overran(START_TIMEOUT) from None
        ready = self._decoded(wire.decode_ready, body)
        if ready.load_error:
            self.kill()
            raise HandlerLoadError(target=hello.handler.target, problem=ready.load_error)
        # What was found may have come in one piece with the answer.
        self.is_checking = hello.checks and not ready.is_async
        if not self.is_checking:
            self._check_end()
        self.is_ready = True
        return ready

    def findings(self, timeout: float) -> list[SinkFinding]:
        """Waits for what the handler's `check()` found; only if it `is_checking`.

        Raises:
            _WorkerDiedError: it took too long and was killed, or died over it.
        """
        try:
            body = self._receive(0, timeout, time.monotonic() + timeout, FINDINGS_MAX)
        except _Late:
            raise self._overran(timeout) from None
        self._check_end()
        found = self._decoded(wire.decode_check, body).findings
        self.is_checking = False
        return found

    def begin(self, job: Job, timeout: float) -> None:
        """Hands the only job over; `finish` waits for its answer.

        Raises:
            _WorkerDiedError: the child died, or did not take the job.
        """
        self._began = time.monotonic()
        message = self._slot.pack(job)
        if len(message) > wire.PACKET_BYTES and timeout != self._timeout:
            self._wait_at_most(timeout)
        try:
            self._hand_over(job, message, 0)
        except BlockingIOError:
            raise self._overran(timeout) from None

    def begin_ahead(self, job: Job) -> bool:
        """Hands one more job over; returns False if it does not fit in beside the others.

        Raises:
            _WorkerDiedError: the child died.
        """
        size = len(job.records.payload)
        start = _free_place(self._jobs[0].start, self._jobs[-1].end, size)
        if start < 0:
            return False
        message = self._slot.pack(job, start)
        if len(message) > wire.PACKET_BYTES:
            return False
        try:
            self._hand_over(job, message, start)
        except BlockingIOError:
            return False
        return True

    def _hand_over(self, job: Job, message: bytes, start: int) -> None:
        self._number += 1
        self._send(message)
        end = start + len(job.records.payload)
        self._jobs.append(_Begun(job.batch, self._number, job.records.count, start, end))

    def finish(self, timeout: float) -> Result | None:
        """Waits for the answer of the oldest job.

        Returns:
            `None` if it is late, and others lie ready behind it: take them back, and wait on.

        Raises:
            _WorkerDiedError: the child died, overran and was killed, or did not answer the job.
        """
        job = self._jobs[0]
        self._monitor.batch = job.batch
        wait = timeout
        if len(self._jobs) > 1:
            wait = min(timeout, AHEAD_SECONDS)
        elif self._is_late:
            wait = self._began + timeout - time.monotonic()
        try:
            body = self._receive(job.number, wait, self._began + timeout, job.records)
        except _Late:
            self._is_late = True
            if len(self._jobs) > 1 and time.monotonic() < self._began + timeout:
                return None
            raise self._overran(timeout) from None
        self._is_late = False
        answer = self._decoded(wire.decode_answer, body)
        if flaw := flaw_of(answer.result, job.records):
            raise self._misfit(flaw)
        self._jobs.popleft()
        self._began = self._answered
        self.answers += 1
        if answer.closing:
            # What says that it is closed may have come in one piece with the answer.
            self.is_closing = True
            self._closing = job.number
            self._closed_by = self._answered + CLOSE_SECONDS
        elif self._rest and not self._jobs:
            raise self._misfit(wire.TRAILING)
        return answer.result

    def take_back(self) -> set[int]:
        """Takes back the jobs that the child has not begun; returns their places, from 0.

        Mostly they are the newest ones, but the child may receive a job while its neighbours are
        taken back.
        """
        taken = wire.take_packets_back(self._unread)
        places = {place for place, job in enumerate(self._jobs) if job.number in taken}
        self._jobs = deque(job for job in self._jobs if job.number not in taken)
        if 0 in places:  # the one that is the oldest now has just been begun
            self._is_late, self._began = False, time.monotonic()
        return places

    def await_closed(self) -> str:
        """Waits until the handler whose call raised last is closed; only if it `is_closing`.

        Returns:
            One line if its `close()` failed.

        Raises:
            _WorkerDiedError: it took too long, or the child died over it.
        """
        self.is_closing = False
        left = max(self._closed_by - time.monotonic(), 0.001)
        try:
            body = self._receive(self._closing, left, self._closed_by)
        except _Late:
            raise self._overran(left) from None
        self._check_end()
        return self._decoded(wire.decode_closed, body).error

    def _check_end(self) -> None:
        if self._rest and not self._jobs:
            raise self._misfit(wire.TRAILING)

    def flaw(self) -> str:
        """Checks the child before it gets a job; returns its fault, or nothing."""
        if self._monitor.ended:
            return "the worker died"
        if time.monotonic() - self._answered < _IDLE_SECONDS:
            return ""  # each call lets the daemon's other threads go first
        try:
            stray = self._sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return ""
        except OSError:
            stray = b""
        return "the worker wrote to its connection" if stray else "the worker died"

    def answered_lately(self, now: float) -> bool:
        """Returns True if nothing has to be looked at before the next job."""
        return now - self._answered < _IDLE_SECONDS and not (self.is_closing or self._monitor.ended)

    def _send(self, message: bytes) -> None:
        try:
            wire.send_packet(
                self._packets, self._sock, message, worker=self.process.pid, number=self._number
            )
        except BlockingIOError:
            raise  # it does not take it
        except OSError:
            raise _WorkerDiedError("crashed", self._obituary()) from None

    def _receive(
        self, number: int, wait: float, deadline: float, records: int = 0
    ) -> bytes | bytearray:
        """The answer to a job.

        Raises:
            _Late: nothing of it came for `wait` seconds, or not all of it until `deadline`.
            _WorkerDiedError: see `finish`.
        """
        self._deadline = deadline
        body: bytes | bytearray | None
        try:
            if not self._rest and wait != self._timeout:
                # Past the deadline, too: the answer may have come while this process stood still.
                self._wait_at_most(max(wait, _LOOK_SECONDS))
            begun = self._rest or self._sock.recv(wire.BUFFER_BYTES)
            body = wire.body_at_once(begun, self.process.pid, number)
            if body is None:
                body = self._receive_slowly(begun, number, wire.answer_bytes_max(records))
            else:
                self._rest = b""
        except BlockingIOError:
            raise _Late from None
        except (wire.MessageMismatch, MemoryError) as error:
            raise self._misfit(str(error)) from None
        except OSError:
            body = None
        if body is None:
            raise _WorkerDiedError("crashed", self._obituary())
        self._answered = time.monotonic()
        return body

    def _receive_slowly(self, begun: bytes, number: int, limit: int) -> bytes | bytearray | None:
        """A message that came in pieces, with bytes behind it or not as it should be."""
        message = wire.receive(
            self._sock,
            worker=self.process.pid,
            limit=limit,
            begun=begun,
            may_follow=True,
            before_more=self._wait_until_deadline,
        )
        if message is None:
            return None
        self._rest = message.rest
        if message.number != number:
            raise wire.MessageMismatch(f"it is about job {message.number}, not {number}")
        return message.body

    def _decoded(self, decode: Callable[[bytes | bytearray], T], body: bytes | bytearray) -> T:
        try:
            return decode(body)
        except (msgspec.MsgspecError, ValueError, RecursionError, MemoryError) as error:
            raise self._misfit(str(error)) from None

    def _wait_at_most(self, timeout: float) -> None:
        if timeout <= 0:
            raise BlockingIOError
        if timeout != self._timeout:
            wire.set_timeout(self._sock, timeout)
            self._timeout = timeout

    def _wait_until_deadline(self) -> None:
        # One byte a second would never be too late otherwise.
        self._wait_at_most(self._deadline - time.monotonic())

    def _overran(self, timeout: float) -> _WorkerDiedError:
        self.kill()
        return _WorkerDiedError("timeout", f"the worker was killed after {timeout:g} s")

    def _misfit(self, flaw: str) -> _WorkerDiedError:
        self.kill()
        return _WorkerDiedError("crashed", f"the worker was killed for its answer: {flaw}")

    def _obituary(self) -> str:
        """Describes the end of the child, whose connection is closed: it is dead or about to be."""
        by_itself = self._monitor.wait(1.0)
        self.kill()
        code = self.process.returncode
        if not by_itself:
            return "the worker closed its connection and was killed"
        if code >= 0:
            return f"the worker exited with code {code}"
        with contextlib.suppress(ValueError):
            return f"the worker was killed by {signal.Signals(-code).name}"
        return f"the worker was killed by signal {-code}"

    def stop(self, timeout: float) -> None:
        """Lets the idle child end by itself, so that the handler's `close()` runs; else kills."""
        with contextlib.suppress(OSError):
            self._packets.shutdown(socket.SHUT_WR)
        self._monitor.wait(timeout)
        self.kill()

    def kill_at_once(self) -> None:
        """Ends a wait for the child; `kill` has to follow. From any thread."""
        if self.process.returncode is None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.process.pid, signal.SIGKILL)
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(self.process.pid, signal.SIGKILL)  # it may have left its group

    def kill(self) -> None:
        """Ends the child and everything that it started, and reaps it. May be repeated."""
        if self._gone:
            return
        self._gone = True
        process_monitor.end_all(self.process.pid, self._mark)
        self._monitor.finish()
        self.process.wait()
        self.not_begun = len(wire.take_packets_back(self._unread))
        self._unread.close()
        self._packets.close()
        self._sock.close()
        self._slot.close()
        os.close(self._lifeline)


def _free_place(first: int, last: int, size: int) -> int:
    """The place in the shared memory for so many bytes; -1 if there is none now.

    Args:
        first: where the oldest payload begins.
        last: where the newest one ends.
        size: bytes.
    """
    if last > first:
        if last + size <= wire.SLOT_BYTES:
            return last
        last = 0
    return last if last + size < first else -1


def _both(
    pair: tuple[socket.socket, socket.socket],
    ours: contextlib.ExitStack,
    theirs: contextlib.ExitStack,
) -> tuple[socket.socket, socket.socket]:
    """A pair of sockets, each of them closed with its side's others."""
    ours.callback(pair[0].close)
    theirs.callback(pair[1].close)
    return pair


class ProcessWorker:
    """One child process at a time; a dead one is replaced when the next job comes.

    Args:
        name: for the thread and the log.
        hello: what each child is told; if that `checks`, the first one is asked for findings, and
            no other.
        timeout: seconds after which a job's child is killed.
        on_restart: called with `crashed` or `timeout`, on the worker's thread, each time a child
            has to be replaced.
        surroundings: what each child is started with; those of now if not given.

    Attributes:
        name: see `ThreadedWorker`.
        is_async: with the executor `auto`, the handler has to be awaited; known after the start.
        pid: of the child; 0 while there is none.
        schema: of the records, from a process that validates; known after the start.
    """

    def __init__(
        self,
        name: str,
        hello: wire.InitMessage,
        *,
        timeout: float,
        on_restart: Callable[[str], None],
        surroundings: Surroundings | None = None,
    ) -> None:
        self.name = name
        self._hello = hello
        self._timeout = timeout
        self._on_restart = on_restart
        self._surroundings = surroundings or Surroundings.now()
        self.is_async = False
        self.schema = b""
        self._child: WorkerProcess | None = None
        self._leaving = False
        self._failed = 0  # jobs that raised since one did not
        self._failing_since = 0.0
        self._patience = FAILING_SECONDS
        self._handed: deque[QueuedJob] = deque()  # with the child, in order
        self._mean = _SLOW  # seconds that a job takes
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=name)

    @property
    def pid(self) -> int:
        """See the class."""
        child = self._child
        return 0 if child is None else child.process.pid

    async def start(self) -> None:
        """See `Worker.start`."""
        await asyncio.get_running_loop().run_in_executor(self._thread, self._start)

    def _start(self) -> None:
        try:
            self._spawn()
        except _WorkerDiedError as died:
            raise HandlerLoadError(target=self._hello.handler.target, problem=str(died)) from None

    def _spawn(self) -> WorkerProcess:
        child = WorkerProcess(self._hello, self.name, self._surroundings)
        self._child, self._failed = child, 0  # from now on `close` can end it
        if self._leaving:
            child.kill_at_once()  # `close` came before there was anything to end
        try:
            ready = child.greet()
        except BaseException:
            self._child = None
            child.kill()
            raise
        log.debug("worker_started", worker=self.name, pid=child.process.pid)
        self.is_async, self.schema = ready.is_async, ready.schema
        self._hello = msgspec.structs.replace(self._hello, checks=False)  # once
        if ready.not_ready:
            log.warning("handler_not_ready", worker=self.name, error=ready.not_ready)
        return child

    def serve(self, jobs: JobQueue) -> None:
        """See `ThreadedWorker.serve`."""
        self._thread.submit(self._serve, jobs)

    def _serve(self, jobs: JobQueue) -> None:
        if self._child is None:
            try:
                self._spawn()
            except (_WorkerDiedError, *_NO_WORKER) as error:
                if self._leaving:
                    return
                log.warning("worker_not_started", worker=self.name, error=describe(error))
        elif self._child.is_checking:
            self._report_findings(self._child)
        while queued := self._handed[0] if self._handed else jobs.take(self.name):
            try:
                # In a copy: a job that goes back may be with another worker before this one is out.
                result = queued.context.copy().run(self._run, jobs, queued)
            except BaseException as error:  # noqa: BLE001  a bug of ours; `done` raises it
                queued.error = error
                self._drop(jobs, queued)
            else:
                if result is None:
                    continue  # it went back; what it has by now is another worker's
                queued.result = result
            jobs.resolve(queued)

    def _report_findings(self, child: WorkerProcess) -> None:
        """Logs what the handler's `check()` found, which may take as long as a job."""
        try:
            log_findings(self.name, child.findings(self._timeout))
        except _WorkerDiedError as died:
            if self._leaving:
                return  # `close` has ended it
            log_findings(self.name, [SinkFinding("error", f"in its check() {died}")])
            self._bury(died.failure)

    def _run(self, jobs: JobQueue, queued: QueuedJob) -> Result | None:
        """Runs the oldest job; `None` if it went back to the queue."""
        started = time.monotonic()
        try:
            child = self._child
            if not self._handed:
                if child is None or self._failed or not child.answered_lately(started):
                    child = self._usable()
                self._handed.append(queued)
                child.begin(queued.job, self._timeout)
            assert child is not None  # noqa: S101  it has the job
            if child.is_closing:
                self._await_closed(child)
            self._hand_ahead(child, jobs)
            while self._has_oldest(queued):
                if (result := child.finish(self._timeout)) is not None:
                    break
                self._take_back(child, jobs)
            else:
                return None
        except _WorkerDiedError as died:
            return self._died(died.failure, jobs, queued, started)
        except _NO_WORKER as error:
            why = str(error) if isinstance(error, HandlerLoadError) else describe(error)
            return self._died(not_started(why), jobs, queued, started)
        self._handed.popleft()
        self._note(result, time.monotonic() - started)
        if child.is_closing and self._handed:
            self._take_back(child, jobs)
        return result

    def _hand_ahead(self, child: WorkerProcess, jobs: JobQueue) -> None:
        """Gives the child the jobs that it shall have beside the oldest one."""
        if jobs.closed or self._failed:
            if len(self._handed) > 1:
                self._take_back(child, jobs)
            return
        most = min(AHEAD_JOBS, int(AHEAD_SECONDS / self._mean))
        while len(self._handed) <= most and (queued := jobs.take_ahead(self.name)):
            self._handed.append(queued)
            if not child.begin_ahead(queued.job):
                jobs.put_back([self._handed.pop()])
                return

    def _take_back(self, child: WorkerProcess, jobs: JobQueue) -> None:
        """Gives the jobs that the child has not begun back to the queue."""
        places = child.take_back()
        jobs.put_back([one for place, one in enumerate(self._handed) if place in places])
        self._handed = deque(one for place, one in enumerate(self._handed) if place not in places)

    def _has_oldest(self, queued: QueuedJob) -> bool:
        """Tells if the child still has this job as its oldest one: it may be taken back, too."""
        return bool(self._handed) and self._handed[0] is queued

    def _note(self, result: Result, seconds: float) -> None:
        """Takes note of what a result and its duration say of the child."""
        self._mean += _WEIGHT * (seconds - self._mean)
        if result.failure is None:
            self._failed, self._patience = 0, FAILING_SECONDS
        elif not result.failure.is_asked:
            self._failed += 1
            if self._failed == 1:
                self._failing_since = time.monotonic()

    def _died(
        self, failure: Failure, jobs: JobQueue, queued: QueuedJob, started: float
    ) -> Result | None:
        """The result of the oldest job, whose child is gone; `None` if it had not begun it."""
        child, had = self._child, len(self._handed)
        if child is not None:
            child.kill()
        self._bury(failure)
        if child is not None and child.answers and 0 < had <= child.not_begun:
            jobs.put_back(self._handed)  # it ended between two jobs
            self._handed.clear()
            return None
        self._drop(jobs, queued)
        return Result(failure=failure, seconds=time.monotonic() - started)

    def _drop(self, jobs: JobQueue, queued: QueuedJob) -> None:
        """Forgets a job that was run; those behind it go back to the queue."""
        jobs.put_back(one for one in self._handed if one is not queued)
        self._handed.clear()
        self._mean = _SLOW

    def _is_no_use(self) -> bool:
        """Returns True after so many failures in a row that a new child may do better."""
        if self._failed < FAILING_TRIES:
            return False
        return time.monotonic() - self._failing_since >= self._patience

    def _usable(self) -> WorkerProcess:
        """A child that is ready for a job; what happened to the last one is no job's fault."""
        child = self._child
        if child is None:
            return self._spawn()
        if child.is_closing:
            try:
                self._await_closed(child)
            except _WorkerDiedError as died:
                self._bury(died.failure)
                return self._spawn()
        if flaw := child.flaw():
            child.kill()
            self._bury(Failure("crashed", f"between two jobs {flaw}"))
            return self._spawn()
        if self._is_no_use():
            log.warning("worker_replaced", worker=self.name, failures=self._failed)
            self._patience = min(2 * self._patience, FAILING_SECONDS_MAX)
            child.stop(CLOSE_SECONDS)  # `close` can still end it
            self._child = None
            return self._spawn()
        return child

    def _await_closed(self, child: WorkerProcess) -> None:
        """Waits until the handler whose call raised last is closed."""
        try:
            error = child.await_closed()
        except _WorkerDiedError as died:
            overran = died.failure.reason == "timeout"
            error = f"it was not done after {CLOSE_SECONDS:g} s" if overran else str(died)
            log.warning("handler_close_failed", worker=self.name, error=error)
            raise
        if error:
            log.warning("handler_close_failed", worker=self.name, error=error)

    def _bury(self, failure: Failure) -> None:
        log.warning("worker_died", worker=self.name, error=failure.error)
        self._child = None
        self._on_restart("timeout" if failure.reason == "timeout" else "crashed")

    def _stop(self, timeout: float) -> None:
        if self._child is not None:
            self._child.stop(timeout)

    async def close(self, deadline: float) -> bool:
        """See `Worker.close`."""
        loop = asyncio.get_running_loop()
        self._leaving = True
        child = self._child
        if child is not None and (child.is_checking or not child.is_ready):
            child.kill_at_once()  # it has nothing to close yet
        closing = loop.run_in_executor(self._thread, self._stop, deadline - loop.time())
        self._thread.shutdown(wait=False)
        done, _ = await asyncio.wait({closing}, timeout=max(0.0, deadline - loop.time()))
        if not done and self._child is not None:
            # The worker's thread waits for its job: killing the child is what ends both.
            self._child.kill_at_once()
            await asyncio.wait({closing}, timeout=5.0)
        return closing.done()
