"""The auditor finds what cooked data has: nobody else looks after it."""

from collections.abc import Callable

import pytest

from tests.chaos.auditor import Audit, Given, Seen, audit

GIVEN = [
    Given(
        number, number % 2, number // 2, b"key %d" % (number % 4), "missing_text" if number % 5 == 3 else "result", 0.5
    )
    for number in range(20)
]
GOOD = [Seen(*given) for given in GIVEN]
RESULTS = [seen for seen in GOOD if seen.kind == "result"]
LETTERS = [seen for seen in GOOD if seen.kind != "result"]


def audited(output: list[Seen], letters: list[Seen] = LETTERS) -> Audit:
    return audit(GIVEN, output, letters)


def test_the_auditor_finds_nothing_where_nothing_is_wrong() -> None:
    found = audited(RESULTS)
    assert found.failures("exactly-once") == []
    assert (found.events, found.kinds) == (20, {"result": 16, "missing_text": 4})


def test_the_auditor_finds_a_lost_result() -> None:
    found = audited(RESULTS[:3] + RESULTS[4:])
    assert found.lost == 1
    assert "event 4 (0-2, result)" in found.failures("at-least-once")[0]


def test_the_auditor_finds_a_lost_dead_letter() -> None:
    assert audited(RESULTS, LETTERS[1:]).lost == 1


def test_a_repeat_is_a_fault_of_exactly_once_alone() -> None:
    found = audited([*RESULTS, RESULTS[-1], RESULTS[-1]], [*LETTERS, LETTERS[0]])
    assert (found.repeats, found.repeated) == (3, 2)
    assert found.repeated_share == pytest.approx(3 / 20)
    assert found.failures("at-least-once") == []
    assert len(found.failures("exactly-once")) == 1


def test_repeats_do_not_break_the_order() -> None:
    assert audited(RESULTS[:8] + RESULTS[2:]).disordered == 0


def test_the_auditor_finds_a_result_that_overtakes_another_of_its_key() -> None:
    first, second = (place for place, seen in enumerate(RESULTS) if seen.key == b"key 0" and seen.number in (4, 12))
    swapped = list(RESULTS)
    swapped[first], swapped[second] = swapped[second], swapped[first]
    assert audited(swapped).disordered > 0


def test_events_of_different_keys_have_no_order() -> None:
    assert audited(sorted(RESULTS, key=lambda seen: (seen.key, seen.number))).disordered == 0


@pytest.mark.parametrize(
    "change",
    [
        lambda seen: seen._replace(kind="inference_failed"),
        lambda seen: seen._replace(key=b"another"),
        lambda seen: seen._replace(offset=seen.offset + 1),
        lambda seen: seen._replace(number=99),
        lambda seen: seen._replace(score=0.4),
    ],
    ids=["dead letter", "key", "place", "stranger", "score"],
)
def test_the_auditor_finds_an_outcome_that_is_wrong(change: Callable[[Seen], Seen]) -> None:
    found = audited([change(RESULTS[0]), *RESULTS[1:]])
    assert (found.wrong, found.lost) == (1, 1)


def test_the_auditor_finds_a_dead_letter_with_a_wrong_reason() -> None:
    assert audited(RESULTS, [LETTERS[0]._replace(kind="empty_text"), *LETTERS[1:]]).wrong == 1


def test_an_event_that_was_given_twice_is_told() -> None:
    assert audit([*GIVEN, GIVEN[0]], RESULTS, LETTERS).wrong == 1
