import asyncio

from worker.runtime.loop_budget import RECORDS, SLICE, TurnBudget


class Loop:
    """How many records were handled in each turn of the event loop, while there was anything to handle."""

    def __init__(self) -> None:
        self.turns: list[int] = []

    async def watch(self) -> None:
        while True:
            self.turns.append(0)
            await asyncio.sleep(0)


async def handle(turn_budget: TurnBudget, loop: Loop, pieces: int, records: int) -> None:
    for _ in range(pieces):
        await turn_budget.before(records)
        loop.turns[-1] += records


async def handled_by(stages: int, records: int, pieces: int = 50) -> Loop:
    turn_budget, loop = TurnBudget(), Loop()
    watching = asyncio.create_task(loop.watch())
    await asyncio.sleep(0)
    await asyncio.gather(*(handle(turn_budget, loop, pieces, records) for _ in range(stages)))
    watching.cancel()
    assert sum(loop.turns) == stages * pieces * records
    return loop


async def test_all_stages_together_handle_no_more_in_a_turn_than_one_may() -> None:
    for stages in (1, 2, 10):
        loop = await handled_by(stages, records=300)
        assert max(loop.turns) <= RECORDS, stages


async def test_what_is_more_than_a_turns_work_has_a_turn_for_itself() -> None:
    loop = await handled_by(3, records=2 * RECORDS)
    assert max(loop.turns) == 2 * RECORDS


async def test_little_does_not_wait() -> None:
    turn_budget = TurnBudget()
    waiting = turn_budget.before(RECORDS - 1)
    try:
        waiting.send(None)
    except StopIteration:
        return
    raise AssertionError("it waited")


async def test_what_was_handled_unasked_counts_too() -> None:
    turn_budget, loop = TurnBudget(), Loop()
    watching = asyncio.create_task(loop.watch())
    await asyncio.sleep(0)
    turn_budget.after(RECORDS)
    loop.turns[-1] += RECORDS
    await handle(turn_budget, loop, 1, 1)
    watching.cancel()
    assert [turn for turn in loop.turns if turn] == [RECORDS, 1]


async def test_who_waits_goes_on_in_the_order_of_asking() -> None:
    turn_budget = TurnBudget()
    order: list[int] = []

    async def begin() -> None:
        turn_budget.after(RECORDS)

    async def ask(number: int) -> None:
        for _ in range(3):
            await turn_budget.before(RECORDS)
            order.append(number)

    await asyncio.gather(begin(), *map(ask, range(4)))
    assert order == [0, 1, 2, 3] * 3


async def test_who_is_cancelled_while_waiting_leaves_the_turn_to_the_next() -> None:
    turn_budget = TurnBudget()
    asking = [asyncio.create_task(turn_budget.before(RECORDS)) for _ in range(4)]
    await asyncio.sleep(0)  # the first has its turn
    for gone in asking[1:3]:
        gone.cancel()
    await asyncio.wait_for(asking[3], 30)
    assert [each.cancelled() for each in asking] == [False, True, True, False]


async def test_many_are_handled_by_slices_in_their_order() -> None:
    turn_budget, loop = TurnBudget(), Loop()
    watching = asyncio.create_task(loop.watch())
    await asyncio.sleep(0)
    items = list(range(5 * SLICE + 1))
    handled: list[int] = []
    async for some in turn_budget.slices(items):
        handled += some
        loop.turns[-1] += len(some)
    watching.cancel()
    assert handled == items
    assert max(loop.turns) <= RECORDS
    assert [some async for some in turn_budget.slices([])] == []
