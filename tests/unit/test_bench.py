"""What `bench` measures and recommends, with a model that answers at once."""

import pytest
import torch

from worker import bench
from worker.backend import BackendError
from worker.bench import FLOAT32, Engine, Measured, Report, Steps, measure
from worker.settings import BenchSettings
from worker.tuning import CPU_BUDGETS, CUDA_BUDGETS


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


class FakeModel:
    name = "fake@1"
    max_tokens = 256

    def __init__(self, device: str, dtype: str, max_batch_tokens: int, passes: int) -> None:
        self.device = torch.device(device)
        self.dtype = dtype
        self.max_batch_tokens = max_batch_tokens
        self.passes = passes

    def get_sentiment(self, texts: list[str]) -> list[str]:
        return ["neutral"] * len(texts)

    def score(self, texts: list[str]) -> None: ...


class Loads:
    """Notes what is loaded; ``refused`` dtypes cannot be."""

    def __init__(self, device: str, refused: str = "") -> None:
        self.seen: list[tuple[str, str, object]] = []
        self._device = device
        self._refused = refused

    def __call__(self, _: str, *, dtype: str, backend: str, max_batch_tokens: object, **__: object) -> FakeModel:
        self.seen.append((backend, dtype, max_batch_tokens))
        if dtype == self._refused:
            raise BackendError("not here")
        budget = max_batch_tokens if isinstance(max_batch_tokens, int) else 4_096
        return FakeModel(self._device, dtype, budget, passes=1 if backend == "torch" else 2)


@pytest.fixture
def settings() -> BenchSettings:
    return BenchSettings(model="fake", seconds=0.001)


def with_loads(monkeypatch: pytest.MonkeyPatch, loads: Loads) -> None:
    monkeypatch.setattr(bench.SentimentModel, "load", loads)
    monkeypatch.setattr(bench, "has_bfloat16", lambda: True)
    monkeypatch.setattr(bench, "is_installed", lambda: True)


@pytest.mark.parametrize("refused", ["", "int8"])
def test_the_bar_comes_to_its_end(monkeypatch: pytest.MonkeyPatch, settings: BenchSettings, refused: str) -> None:
    with_loads(monkeypatch, Loads("cpu", refused))
    steps = Steps()
    report = measure(settings, ["да"] * 600, steps)
    assert steps.done == (
        4 * len(CPU_BUDGETS[:-1]) + len(bench.BATCHES),
        4 * len(CPU_BUDGETS[:-1]) + len(bench.BATCHES),
    )
    assert len(report.engines) == (3 if refused else 4)


def test_on_a_gpu_a_budget_is_measured_with_the_shapes_prepared_for_it(
    monkeypatch: pytest.MonkeyPatch, settings: BenchSettings
) -> None:
    loads = Loads("cuda")
    with_loads(monkeypatch, loads)
    measure(settings, ["да"] * 600, Steps())
    for dtype in ("float32", "auto"):
        assert {budget for _, each, budget in loads.seen if each == dtype} >= set(CUDA_BUDGETS[1:])


def speeds(**by_engine: tuple[Engine, float, int]) -> Report:
    report = Report("m@1", "cpu", 10)
    report.engines = [Measured(engine, {512: speed}, 1.0, threads) for engine, speed, threads in by_engine.values()]
    return report


def test_what_is_recommended_is_the_fastest_exact_one_with_its_own_threads() -> None:
    onnx, int8 = Engine("onnx", "float32", True), Engine("onnx", "int8", False)
    report = speeds(torch=(FLOAT32, 100.0, 1), onnx=(onnx, 200.0, 2), int8=(int8, 300.0, 4))
    assert report.settings().splitlines() == [
        'device = "cpu"', 'backend = "onnx"', 'dtype = "float32"', "max_batch_tokens = 512", "cpu_threads = 2",
    ]  # fmt: skip


def test_on_a_gpu_that_is_the_default_where_it_is_faster() -> None:
    report = speeds(torch=(FLOAT32, 100.0, 1), auto=(Engine("torch", "auto", True), 200.0, 1))
    report.device = "cuda:0"
    assert report.settings().splitlines() == [
        'device = "cuda"', 'backend = "torch"', 'dtype = "auto"', "max_batch_tokens = 512",
    ]  # fmt: skip
