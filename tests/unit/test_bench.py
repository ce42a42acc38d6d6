"""What `bench` measures and recommends, with a model that answers at once."""

import json
from pathlib import Path

import pytest

from worker.commands import bench
from worker.commands.bench import FLOAT32, BenchReport, Engine, EngineSpeed, Steps, measure
from worker.commands.capacity import TextTimes
from worker.model.autotune import CPU_BUDGETS, CUDA_BATCH_TEXTS, CUDA_BUDGETS
from worker.model.runner import BackendError
from worker.model.torch import backends
from worker.model.truncation import TokenizedTexts
from worker.settings.commands import BenchSettings


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
    assert EngineSpeed(FLOAT32, texts_per_s, 1.0, 1).budget == budget


class FakeModel:
    name = "fake@1"
    max_tokens = 256
    text_tokens = 1  # of each text, in all its windows
    most_texts = 0  # at once

    def __init__(self, device: str, dtype: str, max_batch_tokens: int, passes: int, cuda_pass: str) -> None:
        self.device = device
        self.dtype = dtype
        self.max_batch_tokens = max_batch_tokens
        self.passes = passes
        self.cuda_pass = "padded" if device == "cpu" or dtype == "float32" else cuda_pass
        self.scored: set[int] = set()  # with which budgets

    def get_sentiment(self, texts: list[str]) -> list[str]:
        if self.dtype == "float16":
            raise FloatingPointError
        FakeModel.most_texts = max(FakeModel.most_texts, len(texts))
        return ["neutral"] * len(texts)

    def score(self, texts: list[str]) -> None:
        self.scored.add(self.max_batch_tokens)
        FakeModel.most_texts = max(FakeModel.most_texts, len(texts))

    def tokenize(self, texts: list[str]) -> TokenizedTexts:
        return TokenizedTexts([[1] * self.text_tokens] * len(texts), [False] * len(texts))

    def pieces(self, ids: list[list[int]]) -> list[list[int]]:
        return ids

    def batch_logits(self, ids: list[list[int]]) -> None: ...

    def batch_seconds(self, texts: list[str], measuring_s: float) -> dict[int, float]:
        assert len(texts) >= CUDA_BATCH_TEXTS[-1]
        return {512: 0.001, 1_024: 0.0015, 2_048: 0.003}


class Loads:
    """Keeps what is loaded; the dtype ``refused`` cannot be."""

    auto_budget = 4_096

    def __init__(self, device: str, refused: str = "") -> None:
        self.models: list[FakeModel] = []
        self._device = device
        self._refused = refused

    def __call__(
        self, _: str, *, dtype: str, backend: str, max_batch_tokens: object, cuda_pass: str, **__: object
    ) -> FakeModel:
        if dtype == self._refused:
            raise BackendError("not here")
        budget = max_batch_tokens if isinstance(max_batch_tokens, int) else self.auto_budget
        self.models.append(FakeModel(self._device, dtype, budget, 1 if backend == "torch" else 2, cuda_pass))
        return self.models[-1]


@pytest.fixture
def settings() -> BenchSettings:
    return BenchSettings(model="fake", seconds=0.001)


def with_loads(monkeypatch: pytest.MonkeyPatch, loads: Loads) -> None:
    monkeypatch.setattr(bench.SentimentModel, "load", loads)
    monkeypatch.setattr(backends, "has_bfloat16", lambda: True)


@pytest.mark.parametrize("refused", ["", "int8"])
def test_the_bar_comes_to_its_end(monkeypatch: pytest.MonkeyPatch, settings: BenchSettings, refused: str) -> None:
    with_loads(monkeypatch, Loads("cpu", refused))
    steps = Steps()
    report = measure(settings, ["да"] * 600, steps)
    assert steps.done == (4 * len(CPU_BUDGETS) + len(bench.BATCHES),) * 2
    threads = {(each.engine.backend, each.engine.dtype): each.threads for each in report.engines}
    expected = {("torch", "float32"): 1, ("torch", "bfloat16"): 1, ("onnx", "float32"): 2, ("onnx", "int8"): 2}
    assert threads == {engine: count for engine, count in expected.items() if engine[1] != refused}


@pytest.mark.parametrize(
    ("text_tokens", "sample", "sizes"),
    [(128, 2_048, (1, 8, 32, 128, 512)), (2_000, 131, (1, 8, 32)), (10**6, 1, (1,))],
)
def test_of_long_texts_fewer_are_measured_at_once(
    monkeypatch: pytest.MonkeyPatch, settings: BenchSettings, text_tokens: int, sample: int, sizes: tuple[int, ...]
) -> None:
    with_loads(monkeypatch, Loads("cpu"))
    monkeypatch.setattr(FakeModel, "text_tokens", text_tokens)
    monkeypatch.setattr(FakeModel, "most_texts", 0)
    steps = Steps()
    report = measure(settings, ["да"] * 3_000, steps)
    assert FakeModel.most_texts == sample
    assert tuple(report.latency_ms) == sizes
    done, total = steps.done
    assert done == total


def test_on_a_gpu_a_budget_is_measured_with_the_shapes_prepared_for_it(
    monkeypatch: pytest.MonkeyPatch, settings: BenchSettings
) -> None:
    loads = Loads("cuda")
    with_loads(monkeypatch, loads)
    report = measure(settings, ["да"] * 600, Steps())
    assert [each.engine.dtype for each in report.engines] == ["float32", "auto", "bfloat16"]  # float16 gives no numbers
    assert all(each.threads is None for each in report.engines)
    *others, last = loads.models
    scored = [(model.dtype, *model.scored) for model in others if model.scored]
    assert scored == [(each.engine.dtype, budget) for each in report.engines for budget in CUDA_BUDGETS]
    assert (last.dtype, last.scored) == (report.best.engine.dtype, {report.best.budget})
    assert report.max_batch_texts == 1_024
    assert report.times is not None
    assert report.times.device_s == pytest.approx(0.0015 / 1_024)
    assert json.loads(report.as_json())["processes"] >= 1


def test_without_padding_the_budget_that_auto_takes_is_measured_too(
    monkeypatch: pytest.MonkeyPatch, settings: BenchSettings
) -> None:
    loads, steps = Loads("cuda"), Steps()
    loads.auto_budget = 262_144
    with_loads(monkeypatch, loads)
    report = measure(settings.model_copy(update={"cuda_pass": "unpadded"}), ["да"] * 600, steps)
    budgets = {each.engine.dtype: [*each.texts_per_s] for each in report.engines}
    assert budgets["float32"] == [*CUDA_BUDGETS]
    assert budgets["auto"] == [*CUDA_BUDGETS, 262_144]
    done, total = steps.done
    assert done == total
    assert report.cuda_pass == loads.models[-1].cuda_pass
    assert ('cuda_pass = "unpadded"' in report.settings()) == (report.cuda_pass == "unpadded")


AUTO = Engine("torch", "auto", True)


def speeds(device: str, *engines: tuple[Engine, float, int | None, float]) -> BenchReport:
    """Of engines, their texts a second, threads and agreement."""
    report = BenchReport("m@1", device, 10)
    report.engines = [EngineSpeed(engine, {512: speed}, same, threads) for engine, speed, threads, same in engines]
    return report


def test_what_is_recommended_is_the_fastest_exact_one_with_its_own_threads() -> None:
    onnx, int8 = Engine("onnx", "float32", True), Engine("onnx", "int8", False)
    report = speeds("cpu", (FLOAT32, 100.0, 1, 1.0), (onnx, 200.0, 2, 1.0), (int8, 300.0, 4, 0.998))
    assert report.settings().splitlines() == [
        'device = "cpu"', 'backend = "onnx"', 'dtype = "float32"', "max_batch_tokens = 512",
        "max_batch_texts = 512", "cpu_threads = 2",
    ]  # fmt: skip


def test_what_is_recommended_is_what_auto_would_take_by_the_same_figures() -> None:
    """Which looks at a light load too, and not at a backlog alone."""
    onnx = Engine("onnx", "float32", True)
    report = BenchReport("m@1", "cpu", 10)
    report.engines = [EngineSpeed(FLOAT32, {512: 100.0}, 1.0, 1, 0.001), EngineSpeed(onnx, {512: 120.0}, 1.0, 1, 0.003)]
    assert report.best.engine == FLOAT32


def test_on_a_gpu_that_is_the_default_where_it_is_faster() -> None:
    report = speeds("cuda:0", (FLOAT32, 100.0, None, 1.0), (AUTO, 200.0, None, 0.9995))
    assert report.settings().splitlines() == [
        'device = "cuda"', 'backend = "torch"', 'dtype = "auto"', "max_batch_tokens = 512",
        "max_batch_texts = 512",
    ]  # fmt: skip


def test_what_gives_other_labels_on_these_texts_is_not_recommended() -> None:
    assert speeds("cuda:0", (FLOAT32, 100.0, None, 1.0), (AUTO, 200.0, None, 0.97)).best.engine == FLOAT32


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_a_file_of_texts_is_read_as_its_byte_order_mark_says(encoding: str, tmp_path: Path) -> None:
    file = tmp_path / "texts.txt"
    file.write_bytes("хорошо\r\n \r\nплохо".encode(encoding))
    assert bench._texts(file)[:3] == ["хорошо", "плохо", "хорошо"]
    file.write_bytes(b"\xff\n\xd0\xb4\xd0\xb0\n")
    assert set(bench._texts(file)) == {"да"}, "what is no UTF-8 is left out"


def test_how_many_processes_keep_a_gpu_busy_is_said_in_a_sentence() -> None:
    times = TextTimes(tokenize_s=2e-6, python_s=17e-6, device_s=3e-6)
    sentence = bench._processes(times, cores=16)
    assert "2.0 µs to tokenize, 17.0 µs of Python" in sentence
    assert "6 of them keep this GPU busy: about 333,333 texts per second." in sentence
    assert "2 of them are what 3 cores can run; the GPU could serve more" in bench._processes(times, cores=3)
