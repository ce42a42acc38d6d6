"""What is done to the workers, the broker and the network between them. Each act puts right what it has disturbed.

An act takes the scene and the run's random numbers, blocks until it is over, and answers with what it did.
"""

import random
import time
from collections.abc import Callable
from typing import Final

from tests.chaos.cluster import Node, begin_all
from tests.chaos.driver import PARTITIONS, SESSION_S, WORKERS, Scene, Slot, as_given, read
from tests.chaos.questions import make_anew
from tests.support.broker import Broker, free_port
from tests.support.waiting import wait_for

Act = Callable[[Scene, random.Random], str]
UNWRITABLE: Final = "/proc/nowhere"  # for root too


def kill(scene: Scene, chance: random.Random) -> str:
    slot, pause = some_worker(scene, chance), chance.uniform(0, 4)
    scene.fleet.kill(slot, pause)
    return f"{slot.name} is killed, and starts again after {pause:.1f} s"


def zombie(scene: Scene, chance: random.Random) -> str:
    """It sleeps for longer than its session, and wakes without knowing that its partitions are another's."""
    slot, seconds = some_worker(scene, chance), SESSION_S + chance.uniform(1, 5)
    worker = slot.worker
    assert worker is not None
    worker.pause()
    try:
        time.sleep(seconds)
    finally:
        worker.resume()
    return f"{slot.name} is stopped for {seconds:.1f} s, and goes on"


def short_sleep(scene: Scene, chance: random.Random) -> str:
    """Shorter than its session: nobody may take its partitions."""
    slot, seconds = some_worker(scene, chance), chance.uniform(0.5, SESSION_S / 2)
    worker = slot.worker
    assert worker is not None
    worker.pause()
    try:
        time.sleep(seconds)
    finally:
        worker.resume()
    return f"{slot.name} is stopped for {seconds:.1f} s, within its session"


def restart(scene: Scene, chance: random.Random) -> str:
    slot = some_worker(scene, chance)
    code = scene.fleet.terminate(slot)
    return f"{slot.name} is terminated ({code}), and starts again"


def one_more(scene: Scene, chance: random.Random) -> str:
    idle = [slot for slot in scene.fleet.slots if not slot.is_wanted]
    if not idle:
        return one_fewer(scene, chance)
    scene.fleet.begin_again(idle[0])
    return f"{idle[0].name} joins"


def one_fewer(scene: Scene, chance: random.Random) -> str:
    if sum(slot.is_wanted for slot in scene.fleet.slots) < WORKERS:
        return one_more(scene, chance)
    slot = some_worker(scene, chance)
    code = scene.fleet.terminate(slot, forever=True)
    return f"{slot.name} leaves ({code})"


def broker_restart(scene: Scene, chance: random.Random) -> str:
    seconds = chance.uniform(0, 5)
    for broker in scene.brokers[::-1]:  # the controller last: the others cannot stop in order without it
        broker.stop()
    time.sleep(seconds)
    begin(scene.brokers)
    return f"all brokers are stopped, and start again after {seconds:.1f} s"


def broker_kill(scene: Scene, chance: random.Random) -> str:
    seconds = chance.uniform(0, 3)
    for broker in scene.brokers:
        broker.kill()
    time.sleep(seconds)
    begin(scene.brokers)
    return f"all brokers are killed, and start again after {seconds:.1f} s"


def begin(brokers: list[Broker]) -> None:
    """Starts them again, side by side where there are several."""
    nodes = [broker for broker in brokers if isinstance(broker, Node)]
    if nodes:
        begin_all(nodes)
    else:
        brokers[0].start()


def without_leader(scene: Scene, chance: random.Random) -> str:
    """The partitions of one broker have no leader; the others go on."""
    seconds = away(scene.nodes[1], scene.nodes[1].kill, chance)
    return f"broker {scene.nodes[1].number} is killed for {seconds:.1f} s: its partitions have no leader"


def coordinator_away(scene: Scene, chance: random.Random) -> str:
    """The group has no coordinator; the partitions of the other broker keep their leader."""
    seconds = away(scene.nodes[0], scene.nodes[0].stop, chance)
    return f"broker {scene.nodes[0].number}, which coordinates the group, is stopped for {seconds:.1f} s"


def away(node: Node, end: Callable[[], None], chance: random.Random) -> float:
    """Ends one broker, and starts it again after so many seconds."""
    seconds = chance.uniform(2, 10)
    end()
    time.sleep(seconds)
    node.start()
    return seconds


def other_addresses(scene: Scene, chance: random.Random) -> str:
    """All brokers come back where no client knows of; `bootstrap_servers` still lead to them."""
    for node in scene.nodes[::-1]:
        node.stop()
    for number, node in enumerate(scene.nodes):
        ways = [slot.ways[number] for slot in scene.fleet.slots]
        for way in ways:
            way.address.move(free_port())
        node.advertise({way.listener: f"127.0.0.1:{way.address.port}" for way in ways})
    begin_all(scene.nodes)
    before = scene.results()
    scene.feed.trickle()
    wait_for(lambda: scene.results() > before, "a result by the new addresses", 120, 0.5)
    return "all brokers are stopped, and start again under other addresses"


def topic_made_anew(scene: Scene, _: random.Random) -> str:
    """The input topic is deleted when all of it is done, and created again: every worker ends over it, and begins anew."""
    fleet, topics = scene.fleet, scene.topics
    allowed = scene.feed.allowed
    scene.feed.hold()
    scene.wait_until_done()
    scene.past += [as_given(message) for message in read(scene.kafka, topics.input)]
    for slot in fleet.running():  # one that begins meanwhile would know the new topic alone
        wait_until(slot, lambda slot=slot: is_ready(slot), "be ready")  # type: ignore[misc]
    workers = [(slot, slot.worker) for slot in fleet.running()]
    for slot in fleet.slots:
        slot.may_fail = True
    make_anew(scene.kafka.bootstrap, topics.input, PARTITIONS)
    scene.feed.allowed = allowed
    for slot, worker in workers:
        wait_until(slot, lambda slot=slot, worker=worker: slot.worker is not worker, "end over it")  # type: ignore[misc]
    for slot, _ in workers:
        wait_until(slot, lambda slot=slot: is_ready(slot), "be ready")  # type: ignore[misc]
    for slot in fleet.slots:
        slot.may_fail = False
    return "the input topic is deleted and created again"


def slow_output(scene: Scene, chance: random.Random) -> str:
    """The brokers stand still, with every connection open."""
    seconds = chance.uniform(2, SESSION_S + 2)
    for broker in scene.brokers:
        broker.pause()
    try:
        time.sleep(seconds)
    finally:
        for broker in scene.brokers:
            broker.resume()
    return f"all brokers stand still for {seconds:.1f} s"


def resets(scene: Scene, chance: random.Random) -> str:
    times = chance.randint(1, 5)
    for _ in range(times):
        for proxy in scene.proxies:
            proxy.reset()
        time.sleep(chance.uniform(0, 1))
    return f"every connection is reset, {times} times"


def cuts(scene: Scene, chance: random.Random) -> str:
    times = chance.randint(3, 20)
    for _ in range(times):
        chance.choice(scene.proxies).cut()
        time.sleep(0.2)
    return f"{times} messages are cut in half"


def delay(scene: Scene, chance: random.Random) -> str:
    delay_s, seconds = chance.uniform(0.05, 0.5), chance.uniform(3, 8)
    for proxy in scene.proxies:
        proxy.set(delay_s=delay_s)
    try:
        time.sleep(seconds)
    finally:
        for proxy in scene.proxies:
            proxy.set()
    return f"the network delays by {delay_s * 1000:.0f} ms, for {seconds:.1f} s"


def partition(scene: Scene, chance: random.Random) -> str:
    """One worker's packets go nowhere for longer than its session: a zombie that knows of time."""
    slot, seconds = some_worker(scene, chance), chance.uniform(2, SESSION_S + 4)
    slot.network(swallows=True)
    try:
        time.sleep(seconds)
    finally:
        slot.network()
    return f"{slot.name} is cut off for {seconds:.1f} s, its connections open"


def refusal(scene: Scene, chance: random.Random) -> str:
    slot, seconds = some_worker(scene, chance), chance.uniform(2, SESSION_S + 4)
    slot.network(refuses=True)
    try:
        time.sleep(seconds)
    finally:
        slot.network()
    return f"{slot.name} is refused every connection for {seconds:.1f} s"


def model_raises(scene: Scene, chance: random.Random) -> str:
    return lost_model(scene, some_worker(scene, chance), "raise")


def model_shapes(scene: Scene, chance: random.Random) -> str:
    return lost_model(scene, some_worker(scene, chance), "shape")


def model_hangs(scene: Scene, chance: random.Random) -> str:
    return lost_model(scene, some_worker(scene, chance), "hang 3600")


def model_without_memory(scene: Scene, chance: random.Random) -> str:
    return lost_model(scene, some_worker(scene, chance), "memory")


def model_hesitates(scene: Scene, chance: random.Random) -> str:
    """For less than inference_timeout_s: nothing may come of it."""
    slot, seconds = some_worker(scene, chance), chance.uniform(1, 3)
    slot.fault.write_text(f"hang {seconds:.1f}")
    time.sleep(seconds)
    slot.fault.unlink()
    return f"the model of {slot.name} takes {seconds:.1f} s for a batch"


def model_short_of_memory(scene: Scene, chance: random.Random) -> str:
    """For less than the worker's patience."""
    slot, seconds = some_worker(scene, chance), chance.uniform(0.2, 1)
    slot.fault.write_text("memory")
    time.sleep(seconds)
    slot.fault.unlink()
    return f"the model of {slot.name} is out of memory for {seconds:.1f} s"


def unwritable(scene: Scene, chance: random.Random) -> str:
    """A worker that may write to no cache folder, and whose log goes to a full disk."""
    slot = some_worker(scene, chance)
    slot.variables = dict.fromkeys(("HOME", "XDG_CACHE_HOME", "HF_HOME", "TMPDIR"), UNWRITABLE)
    code = scene.fleet.terminate(slot)
    wait_for(lambda: is_ready(slot), f"{slot.name} to be ready", 60)
    slot.variables = {}
    return f"{slot.name} is terminated ({code}), and starts again where it can write to no folder"


def lost_model(scene: Scene, slot: Slot, fault: str) -> str:
    """The worker has to end by itself; another starts in its place."""
    worker = slot.worker

    def is_gone() -> bool:
        scene.feed.trickle()
        return slot.worker is not worker

    slot.may_fail = True
    slot.fault.write_text(fault)
    try:
        wait_for(is_gone, f"{slot.name} to end over its model ({fault})", 90)
    finally:
        slot.fault.unlink()
    wait_for(lambda: slot.worker is not None, f"{slot.name} to start again")
    slot.may_fail = False
    return f"the model of {slot.name} is lost ({fault})"


def some_worker(scene: Scene, chance: random.Random) -> Slot:
    """One that is at work."""
    wanted = [slot for slot in scene.fleet.slots if slot.is_wanted]
    slot = chance.choice(wanted)
    wait_for(lambda: is_ready(slot), f"{slot.name} to be ready", 120, describe=lambda: last_words(slot))
    return slot


def wait_until(slot: Slot, condition: Callable[[], object], what: str) -> None:
    wait_for(condition, f"{slot.name} to {what}", 60, describe=lambda: last_words(slot))


def is_ready(slot: Slot) -> bool:
    worker = slot.worker
    return worker is not None and worker.status("/readyz") == 200


def last_words(slot: Slot) -> str:
    return slot.worker.output[-1500:] if slot.worker else "(it does not run)"


ACTS: Final[dict[str, Act]] = {
    act.__name__: act
    for act in (
        kill, zombie, restart, one_more, broker_restart, resets, model_raises, partition, broker_kill, slow_output, cuts,
        model_hangs, one_fewer, delay, unwritable, model_shapes, refusal, model_without_memory, model_hesitates,
        short_sleep, model_short_of_memory, without_leader, coordinator_away, other_addresses, topic_made_anew,
    )
}  # fmt: skip
OF_SEVERAL_BROKERS: Final = {"without_leader", "coordinator_away", "other_addresses"}


def plan(count: int, chance: random.Random, has_several_brokers: bool) -> list[str]:
    """`count` acts: every one as often as any other, in an order that chance gives."""
    possible = [name for name in ACTS if has_several_brokers or name not in OF_SEVERAL_BROKERS]
    rounds = -(-count // len(possible))
    names: list[str] = []
    for _ in range(rounds):
        names += chance.sample(possible, len(possible))
    return names[:count]
