"""What `bench` recommends."""

import pytest

from worker.bench import Engine, Measured


@pytest.mark.parametrize(
    ("texts_per_s", "budget"),
    [
        ({512: 100.0, 1_024: 102.0, 2_048: 101.0}, 512),
        ({512: 100.0, 1_024: 110.0, 2_048: 112.0}, 1_024),
        ({512: 100.0}, 512),
        ({512: 100.0, 1_024: 102.9, 2_048: 105.8}, 1_024),
    ],
)
def test_a_larger_budget_has_to_be_worth_it(texts_per_s: dict[int, float], budget: int) -> None:
    assert Measured(Engine("torch", "float32", True), texts_per_s, 1.0).budget == budget
