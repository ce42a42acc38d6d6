"""What benchmarks/scale.py measures: each part starts a broker, topics and workers of its own, and answers with figures.

The model costs nothing, unless a part says so: what is left is the plumbing. Readers are taken to read committed records
alone; waits are from the moment when the broker has an event to the moment when its result can be read.
"""

import io
import os
import random
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, redirect_stdout
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

from benchmarks.broker_log import TopicLog, Wait, percentiles, waits
from benchmarks.common import event
from benchmarks.testbed import Testbed, new_testbed, now_ms
from tests.support.broker import start_broker
from tests.support.topics import Record
from tests.support.waiting import wait_for

Figures = dict[str, float]

STEADY_RATE = 200
FAST_RATE = 2_000
GROUP = 4
SESSION_MS = 6_000
STATIC_SESSION_MS = 45_000  # long enough for a restart
BASELINE_S = 5.0
DELAY_MS = 100
HOLD_S = 4.0
BACKLOG_EVENTS = 200_000
BACKLOG_TEXTS = 5_000
PASS_S = 0.05  # of a model that is slower than the plumbing
SLOW_PASS_S = 0.5  # of one that leaves a backlog where it is
UNEQUAL_EVENTS = 100_000
UNEQUAL_SHARE = 0.95
UNEQUAL_RATE = 100
REFUSED_EVENTS = 100_000
UNPACKED_BYTES = 2_000_000  # of a partition's backlog
TEXT_BYTES = 2_000


@contextmanager
def fresh(partitions: int, delivery: str) -> Iterator[Testbed]:
    """With a broker of its own. What workers print is left out; that of one that fails is in the error."""
    settings = {"delivery": delivery, "session_timeout_ms": SESSION_MS, "log_level": "warning"}
    with (
        closing(start_broker(controllable=True)) as broker,
        redirect_stdout(io.StringIO()),
        new_testbed(broker, partitions, **settings) as bed,
    ):
        yield bed


def slow(pass_s: float) -> dict[str, str]:
    """The environment of a worker whose model takes so long for a pass."""
    return {"PASS_SECONDS": str(pass_s)}


def member(name: str | None) -> dict[str, object]:
    """The settings of a worker with an instance id, or of one without."""
    return {"group_instance_id": name, "session_timeout_ms": STATIC_SESSION_MS} if name else {}


# One process.


def fast(partitions: int, delivery: str, seconds: float) -> Figures:
    """Ten times the steady load."""
    return steady(partitions, delivery, seconds, FAST_RATE)


def steady(partitions: int, delivery: str, seconds: float, rate: float = STEADY_RATE) -> Figures:
    """A steady load: waits and what the process holds after a warm-up of half the time."""
    with fresh(partitions, delivery) as bed:
        worker = bed.start().wait_until_assigned(partitions)
        with bed.load(rate):
            time.sleep(seconds / 2)
            begin, cpu_s = now_ms(), cpu_seconds(worker.pid)
            time.sleep(seconds)
            end, cpu_s = now_ms(), cpu_seconds(worker.pid) - cpu_s
            held = process_figures(worker.pid, bed.broker.bootstrap)
        bed.wait_until_done()
        assert worker.terminate() == 0
        measured = [wait.ms for wait in bed.waits() if begin <= wait.from_ms < end]
        commits = sum(begin <= moment < end for moment in bed.commits(exactly_once=delivery == "exactly-once"))
        return {
            "events_per_s": round(len(measured) / seconds, 1),
            **percentiles(measured),
            **held,
            "commits_per_s": round(commits / seconds, 1),
            "control_records_per_result": control_share(bed.output()),
            "cores": round(cpu_s / seconds, 2),
        }


def backlog(partitions: int, delivery: str, seconds: float) -> Figures:
    """A backlog: events/s from a tenth of the results to nine tenths of them."""
    texts = [f"{number} " + "событие, всё хорошо или не очень " * 4 for number in range(BACKLOG_TEXTS)]
    with fresh(partitions, delivery) as bed:
        records = (event(number, texts[number % BACKLOG_TEXTS]) for number in range(BACKLOG_EVENTS))
        bed.publish(records)
        worker = bed.start()
        bed.wait_until_done()
        peak_mb = round(memory_kb(worker.pid, "VmHWM") / 1e3)
        assert worker.terminate() == 0
        output = bed.output()
        speed, commits = output.per_second(), len(bed.commits(exactly_once=delivery == "exactly-once"))
        return {
            "events_per_s": round(speed),
            "peak_memory_mb": peak_mb,
            "commits_per_s": round(commits / output.records * speed, 1),
            "control_records_per_result": control_share(output),
        }


def memory(partitions: int, delivery: str, seconds: float) -> Figures:
    """What a backlog of compressed, large batches in every partition adds to the memory of a worker with a slow model."""
    value = event(0, "событие, всё хорошо или не очень " * (TEXT_BYTES // 60)).value
    sending = {"compression.type": "zstd", "linger.ms": 200, "batch.size": 900_000, "message.max.bytes": 1_000_000}
    with fresh(partitions, delivery) as bed:
        idle = bed.start().wait_until_assigned(partitions)
        idle_mb = memory_kb(idle.pid, "VmRSS") / 1e3
        assert idle.terminate() == 0
        count = UNPACKED_BYTES // len(value or b"")
        records = (Record(value, partition=partition) for partition in range(partitions) for _ in range(count))
        bed.publish(records, **sending)
        worker = bed.start(slow(SLOW_PASS_S)).wait_until_assigned(partitions)
        wait_for(lambda: worker.metrics.get("records_consumed_total"), "the first results", 300)
        time.sleep(seconds)
        peak_mb = memory_kb(worker.pid, "VmHWM") / 1e3
        worker.kill()
    return {
        "idle_mb": round(idle_mb),
        "peak_mb": round(peak_mb),
        "mb_per_partition": round((peak_mb - idle_mb) / partitions, 2),
    }


def join(partitions: int, delivery: str, seconds: float) -> Figures:
    """A second member joins under a steady load."""
    with fresh(partitions, delivery) as bed:
        first = bed.start().wait_until_assigned(partitions)
        with bed.load(STEADY_RATE):
            time.sleep(seconds / 2)
            quiet = baseline()
            second = bed.start()
            wait_for(lambda: bed.group() != ("STABLE", 1), "a second member to join", every=0.02)
            joined = now_ms()
            wait_for(lambda: bed.group() == ("STABLE", 2), "the group to share its partitions", every=0.02)
            stable = now_ms()
            bed.wait_until_shared([first, second])
            time.sleep(HOLD_S)
        bed.wait_until_done()
        assert [worker.terminate() for worker in (first, second)] == [0, 0]
        return {"join_to_stable_s": seconds_between(joined, stable), **interruption(bed.waits(), quiet, joined)}


def kill(partitions: int, delivery: str, seconds: float) -> Figures:
    """kill -9 of the only worker under a steady load; another starts at once. `own_start_s` is that of the first."""
    return restart_after_kill(partitions, delivery, seconds, None)


def kill_static(partitions: int, delivery: str, seconds: float) -> Figures:
    """The same with an instance id, which the other has too."""
    return restart_after_kill(partitions, delivery, seconds, "one")


def restart_after_kill(partitions: int, delivery: str, seconds: float, name: str | None) -> Figures:
    with fresh(partitions, delivery) as bed:
        started = now_ms()
        worker = bed.start(**member(name)).wait_until_assigned(partitions)
        own_start_s = seconds_between(started, now_ms())
        with bed.load(STEADY_RATE):
            time.sleep(seconds / 2)
            quiet = baseline()
            killed = now_ms()
            worker.kill()
            worker = bed.start(**member(name)).wait_until_assigned(partitions)
            time.sleep(HOLD_S)
        bed.wait_until_done()
        assert worker.terminate() == 0
        found = bed.waits()
        first = min(wait.to_ms for wait in found if wait.to_ms > killed + 300)  # what was on its way is not the other's
        return {
            "own_start_s": own_start_s,
            "first_result_s": seconds_between(killed, first),
            **interruption(found, quiet, killed),
        }


# Unequal partitions.


def unequal(partitions: int, delivery: str, seconds: float) -> Figures:
    """Partition 0 has 95 % of a backlog, and the others a steady load besides: how long their events wait meanwhile.

    A pass of the model takes 50 ms: that is a micro-batch's turn.
    """
    large = int(UNEQUAL_EVENTS * UNEQUAL_SHARE)
    with fresh(partitions, delivery) as bed:
        records = [unequal_record(number, 0 if number < large else neighbour(number, partitions))
                   for number in range(UNEQUAL_EVENTS)]  # fmt: skip
        bed.publish(records)
        worker = bed.start(slow(PASS_S)).wait_until_assigned(partitions)

        def later(number: int) -> Record:
            return unequal_record(UNEQUAL_EVENTS + number, neighbour(number, partitions))

        with bed.load(UNEQUAL_RATE, later):
            bed.wait_until_done([0])
        bed.wait_until_done()
        assert worker.terminate() == 0
        events, results = bed.input(), bed.output().first()
        begin = min(result.since_ms for result in results.values())
        end = max(results[number].since_ms for number in range(large))
        others_end = max(results[number].since_ms for number in range(large, UNEQUAL_EVENTS))
        found = [
            wait.ms for wait in waits(events, results) if wait.partition and wait.from_ms > begin and wait.to_ms < end
        ]
        return {
            "events_per_s": round(large / (end - begin) * 1000),
            "backlog_done_s": seconds_between(begin, end),
            "neighbours_backlog_done_s": seconds_between(begin, others_end),
            **percentiles(found),
            "max_ms": max(found),
        }


def unequal_record(number: int, partition: int) -> Record:
    return Record(event(number, f"текст {number}").value, partition=partition)


def neighbour(number: int, partitions: int) -> int:
    return 1 + number % (partitions - 1)


def refused(partitions: int, delivery: str, seconds: float) -> Figures:
    """A backlog whose partition 0 holds results that the output topic refuses for their size, and one in which it does not.

    The speed is that of the other partitions. Each refused result is of another size, which nothing compresses.
    """
    speeds = {
        name: neighbours_per_second(partitions, delivery, bytes_, refused=name == "refused")
        for name, bytes_ in (("taken", (1_000, 1_900)), ("refused", (3_100, 4_000)))
    }
    return {
        "neighbours_per_s": round(speeds["refused"]),
        "neighbours_of_taken_per_s": round(speeds["taken"]),
        "ratio": round(speeds["refused"] / speeds["taken"], 3),
    }


def neighbours_per_second(partitions: int, delivery: str, header_bytes: tuple[int, int], *, refused: bool) -> float:
    """Results per second of all partitions but the first, whose records have a header of such a size."""

    def records() -> Iterator[Record]:
        for number in range(REFUSED_EVENTS):
            partition = number % partitions
            headers = () if partition else (("h", os.urandom(random.randint(*header_bytes))),)
            yield replace(unequal_record(number, partition), headers=headers)

    with fresh(partitions, delivery) as bed:
        bed.kafka.set_config(bed.topics.output, "max.message.bytes", 3_000)
        bed.publish(records())
        worker = bed.start(dead_letter_limit=0)
        bed.wait_until_done()
        dead_letters = worker.metrics.get("dead_letters_total")
        assert dead_letters == (REFUSED_EVENTS / partitions if refused else 0), f"{dead_letters:.0f} dead letters"
        assert worker.terminate() == 0
        times = [result.since_ms for number, result in bed.output().first().items() if number % partitions]
        return len(times) / (max(times) - min(times)) * 1000


# Four workers.


def rolling(partitions: int, delivery: str, seconds: float) -> Figures:
    """Four workers are restarted one after another under a steady load."""
    return rolling_restart(partitions, delivery, seconds, [None] * GROUP)


def rolling_static(partitions: int, delivery: str, seconds: float) -> Figures:
    """The same with instance ids, which are kept."""
    return rolling_restart(partitions, delivery, seconds, [f"number-{number}" for number in range(GROUP)])


def rolling_restart(partitions: int, delivery: str, seconds: float, names: Sequence[str | None]) -> Figures:
    with fresh(partitions, delivery) as bed:
        group = [bed.start(**member(name)) for name in names]
        bed.wait_until_shared(group)
        with bed.load(STEADY_RATE):
            time.sleep(seconds / 2)
            begin = now_ms()
            for number, name in enumerate(names):
                assert group[number].terminate() == 0
                group[number] = bed.start(**member(name))
                bed.wait_until_shared(group)
            end = now_ms()
            time.sleep(HOLD_S)
        bed.wait_until_done()
        assert [worker.terminate() for worker in group] == [0] * GROUP
        return {"took_s": seconds_between(begin, end), **stillness(bed.waits(), begin, end)}


def one_to_four(partitions: int, delivery: str, seconds: float) -> Figures:
    """Three workers join one at once under a steady load, and leave it again."""
    with fresh(partitions, delivery) as bed:
        group = [bed.start().wait_until_assigned(partitions)]
        with bed.load(STEADY_RATE):
            time.sleep(seconds / 2)
            grows = now_ms()
            group += [bed.start() for _ in range(GROUP - 1)]
            bed.wait_until_shared(group)
            time.sleep(HOLD_S)
            shrinks = now_ms()
            for worker in group[1:]:
                worker.ask(signal.SIGTERM)
            assert [worker.wait() for worker in group[1:]] == [0] * (GROUP - 1)
            bed.wait_until_shared(group[:1])
            time.sleep(HOLD_S)
            end = now_ms()
        bed.wait_until_done()
        assert group[0].terminate() == 0
        found = bed.waits()
        phases = {"grows": stillness(found, grows, shrinks), "shrinks": stillness(found, shrinks, end)}
        return {f"{phase}_{name}": value for phase, figures in phases.items() for name, value in figures.items()}


# Evaluation.


def baseline() -> tuple[float, float]:
    """Lets a while pass in which nothing is disturbed, and answers with its beginning and its end."""
    begin = now_ms()
    time.sleep(BASELINE_S)
    return begin, now_ms()


def interruption(found: Sequence[Wait], quiet: tuple[float, float], disturbed: float) -> Figures:
    """What a disturbance did: seconds until the last event that it delayed had its result, and the longest wait.

    An event counts as delayed if it waited for DELAY_MS longer than any in the quiet time before.
    """
    calm = [wait.ms for wait in found if quiet[0] <= wait.from_ms and wait.to_ms < quiet[1]]
    longest = max(calm, default=quiet[1] - quiet[0])  # where none was done in that time
    after = [wait for wait in found if wait.to_ms >= disturbed]
    last = max((wait.to_ms for wait in after if wait.ms > longest + DELAY_MS), default=disturbed)
    return {
        "all_served_s": seconds_between(disturbed, last),
        "longest_wait_s": seconds_between(0, max(wait.ms for wait in after)),
        "longest_wait_before_s": seconds_between(0, longest),
    }


def stillness(found: Sequence[Wait], begin: float, end: float) -> Figures:
    """Between two moments: the longest time without any result, and the waits of the events."""
    moments = [begin, *sorted(wait.to_ms for wait in found if begin <= wait.to_ms < end), end]
    within = [wait.ms for wait in found if begin <= wait.from_ms < end]
    return {
        "without_a_result_s": seconds_between(0, max(later - one for one, later in pairwise(moments))),
        "longest_wait_s": seconds_between(0, max(within)),
        "p95_wait_s": seconds_between(0, percentiles(within)["p95_ms"]),
    }


def control_share(output: TopicLog) -> float:
    return round(output.control_records / output.records, 3)


def seconds_between(begin_ms: float, end_ms: float) -> float:
    return round((end_ms - begin_ms) / 1000, 2)


# A process, as Linux tells of it.


def process_figures(pid: int, bootstrap: str) -> Figures:
    files = [str(path.readlink()) for path in Path(f"/proc/{pid}/fd").iterdir()]
    return {
        "memory_mb": round(memory_kb(pid, "VmRSS") / 1e3),
        "connections": len({name for name in files if name.startswith("socket:")} & connections_to(bootstrap)),
        "open_files": len(files),
    }


def connections_to(bootstrap: str) -> set[str]:
    """The names of all sockets of this machine that are connected to a broker."""
    port = f":{int(bootstrap.rpartition(':')[2]):04X}"
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return {f"socket:[{row[9]}]" for row in rows if row[2].endswith(port) and row[3] == "01"}


def memory_kb(pid: int, field: str) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


def cpu_seconds(pid: int) -> float:
    ticks = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]
    return sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK")
