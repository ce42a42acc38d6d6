"""``sentiment-worker bench``: this machine's speed with this model, and the settings to use. No Kafka."""

import logging
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import cycle, islice
from operator import eq
from pathlib import Path
from typing import Final, Literal, NamedTuple

import orjson
from rich.console import Console
from rich.progress import Progress
from rich.table import Column, Table

from worker.commands.capacity import TextTimes, processes_for_device, python_seconds
from worker.commands.classify import file_lines
from worker.commands.load_model import checkpoint_options, prepare_process
from worker.errors import WrongSetting
from worker.model.autotune import (
    BATCH_TEXTS,
    CUDA_BATCH_TEXTS,
    MIN_GAIN,
    TUNING_S,
    available_cores,
    best_batch_texts,
    candidate_budgets,
    fastest,
    shortest_run_s,
    smallest_at_full_speed,
)
from worker.model.device import has_torch
from worker.model.reviews import read_reviews
from worker.model.runner import AGREEMENT, BackendError, CudaPass
from worker.model.sentiment_model import SentimentModel
from worker.printable import counted, printable
from worker.runtime.memory import free_device_memory
from worker.settings.commands import BenchSettings

BATCHES: Final = (1, 8, 32, 128, 512)
SAMPLE: Final = 2_048  # texts on which labels are compared
TOKENS_PER_TEXT: Final = 128  # of the measured texts on average; of longer texts there are fewer, so that it ends soon

log = logging.getLogger(__name__)


class Engine(NamedTuple):
    """What runs the model. ``auto`` takes only one that ``is_exact``: 999 of 1,000 of its labels are those of float32."""

    backend: str
    dtype: str
    is_exact: bool

    def __str__(self) -> str:
        return f"{self.backend} {self.dtype}"


FLOAT32: Final = Engine("auto", "float32", True)  # what labels are compared with


@dataclass
class EngineSpeed:
    """One engine's texts per second by token budget. ``agreement`` is the share of its labels that are float32's."""

    engine: Engine
    texts_per_s: dict[int, float]
    agreement: float
    threads: int | None  # on a CPU
    one_text_s: float = 1.0  # seconds for one text alone

    @property
    def budget(self) -> int:
        """The smallest that is about as fast as any, because smaller device batches take less memory and end sooner."""
        return smallest_at_full_speed(self.texts_per_s)

    @property
    def speed(self) -> float:
        return self.texts_per_s[self.budget]


@dataclass
class BenchReport:
    """What was measured. On a GPU, ``batch_seconds`` has the model's seconds for a micro-batch by its texts, and ``times``
    what one process spends on a text.
    """

    model: str
    device: str
    texts: int
    engines: list[EngineSpeed] = field(default_factory=list)
    cuda_pass: CudaPass = "padded"  # of the best engine
    latency_ms: dict[int, float] = field(default_factory=dict)
    batch_seconds: dict[int, float] = field(default_factory=dict)
    times: TextTimes | None = None

    @property
    def best(self) -> EngineSpeed:
        """The engine that ``auto`` would take by these figures: of those that are exact, on these texts too, the fastest."""
        exact = [each for each in self.engines if each.engine.is_exact and each.agreement >= AGREEMENT]
        took = {place: (each.one_text_s, 1 / each.speed) for place, each in enumerate(exact)}
        return exact[fastest(took)]

    @property
    def max_batch_texts(self) -> int:
        """What ``auto`` would take by these figures."""
        return best_batch_texts(self.batch_seconds) if self.batch_seconds else BATCH_TEXTS

    def settings(self) -> str:
        """Lines for the file of ``--config``."""
        best = self.best
        lines = [
            f'device = "{self.device.partition(":")[0]}"', f'backend = "{best.engine.backend}"',
            f'dtype = "{best.engine.dtype}"', f"max_batch_tokens = {best.budget}",
            f"max_batch_texts = {self.max_batch_texts}",
        ]  # fmt: skip
        if best.threads is not None:
            lines.append(f"cpu_threads = {best.threads}")
        if self.cuda_pass != "padded":
            lines.append(f'cuda_pass = "{self.cuda_pass}"')
        return "\n".join(lines)

    def hours_per_million(self) -> float:
        return 1e6 / self.best.speed / 3600

    def as_json(self) -> bytes:
        engines = [
            {**each.engine._asdict(), "texts_per_s": {str(k): round(v, 1) for k, v in each.texts_per_s.items()},
             "agreement": round(each.agreement, 6), "cpu_threads": each.threads} for each in self.engines
        ]  # fmt: skip
        answer = asdict(self) | {
            "engines": engines,
            "latency_ms": {str(size): round(ms, 3) for size, ms in self.latency_ms.items()},
            "batch_seconds": {str(texts): round(took_s, 6) for texts, took_s in self.batch_seconds.items()},
            "times": self.times and self.times._asdict(),
            "processes": self.times and processes_for_device(self.times, available_cores()).processes,
            "settings": self.settings(),
            "hours_per_million": round(self.hours_per_million(), 4),
        }
        return orjson.dumps(answer, option=orjson.OPT_INDENT_2)


def run(settings: BenchSettings) -> int:
    """Measures and prints. Blocks for a minute or so, on a GPU for several. Returns the exit code. Raises UserError."""
    texts = _texts(settings.file)
    with Steps(settings.json_output) as steps:
        report = measure(settings, texts, steps)
    if settings.json_output:
        sys.stdout.buffer.write(report.as_json() + b"\n")
    else:
        _print(report)
    return 0


class Steps:
    """A progress bar on standard error, erased at the end; ``is_quiet`` shows none."""

    def __init__(self, is_quiet: bool = True) -> None:
        self._progress = Progress(console=Console(stderr=True), disable=is_quiet, transient=True)
        self._task = self._progress.add_task("loading", total=None)

    def __enter__(self) -> "Steps":
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    @property
    def done(self) -> tuple[float, float | None]:
        """How many steps have ended, and of how many."""
        (task,) = self._progress.tasks
        return task.completed, task.total

    def expect(self, count: int) -> None:
        """There are so many in all."""
        self._progress.update(self._task, total=count)

    def expect_more(self, count: int) -> None:
        _, total = self.done
        self.expect(count + int(total or 0))

    def tell(self, what: str) -> None:
        """Shows what is being done."""
        self._progress.update(self._task, description=what)

    def skip(self, count: int) -> None:
        self._progress.advance(self._task, count)

    @contextmanager
    def step(self, what: str) -> Iterator[None]:
        """Shows what is being measured, and counts the step when it has ended."""
        self.tell(what)
        yield
        self._progress.advance(self._task)


def measure(settings: BenchSettings, texts: Sequence[str], steps: Steps) -> BenchReport:
    """Measures all engines that this machine has, on as many texts as a micro-batch has, tokenizing included."""
    prepare_process()
    first = _load(settings, FLOAT32)
    report = BenchReport(first.name, first.device, len(texts))
    wanted = first.get_sentiment(list(texts[: _at_most(SAMPLE, first, texts)]))
    engines, budgets = list(_engines(report.device)), _budgets(first)
    size = _at_most(_micro_batch(report.device), first, texts)
    texts = list(islice(cycle(texts), max(_micro_batch(report.device), len(texts))))
    del first  # one model at a time: a device may have no room for two
    sizes = [each for each in BATCHES if each <= size]
    steps.expect(len(engines) * len(budgets) + len(sizes))
    for engine in engines:
        steps.tell(f"loading {engine}")
        try:
            report.engines.append(_measure_engine(settings, engine, budgets, texts, size, wanted, steps))
        except (BackendError, FloatingPointError) as error:
            log.info("%s is left out: %s", engine, error)
            steps.skip(len(budgets))
    best = _load(settings, report.best.engine, report.best.budget)
    report.cuda_pass = best.cuda_pass
    for each in sizes:
        with steps.step(f"latency of {counted(each, 'text')}"):
            report.latency_ms[each] = _latency_ms(best, texts[:each], settings.seconds)
    if report.device != "cpu":
        steps.tell("micro-batches")
        report.batch_seconds = best.batch_seconds(texts, measuring_s=len(CUDA_BATCH_TEXTS) * settings.seconds)
        if report.batch_seconds:
            size = report.max_batch_texts
            report.times = _text_times(best, texts, report.batch_seconds[size] / size)
    return report


def _text_times(model: SentimentModel, texts: Sequence[str], device_s: float) -> TextTimes:
    """What one process with a model on a GPU spends on each of these texts. ``device_s``: what is known already.

    The CPU time of the passes is Python's and the driver's, because a thread that waits for the device sleeps.
    """
    some = texts[: CUDA_BATCH_TEXTS[-1]]
    tokenize_s = shortest_run_s(lambda: model.tokenize(some)) / len(some)
    ids = model.pieces(model.tokenize(some).ids)
    began_s = time.process_time()
    model.batch_logits(ids)
    sending_s = (time.process_time() - began_s) / len(some)
    return TextTimes(tokenize_s, python_seconds(some) + sending_s, device_s)


def _measure_engine(
    settings: BenchSettings,
    engine: Engine,
    budgets: Sequence[int],
    texts: Sequence[str],
    size: int,
    wanted: Sequence[str | None],
    steps: Steps,
) -> EngineSpeed:
    """``size`` is how many texts are scored at once; ``wanted`` are the labels of the first texts in float32."""
    model = _load(settings, engine)
    is_on_cpu = model.device == "cpu"
    agreement = sum(map(eq, wanted, model.get_sentiment(list(texts[: len(wanted)])))) / len(wanted)
    measured = EngineSpeed(engine, {}, agreement, model.passes if is_on_cpu else None)
    if model.cuda_pass == "unpadded":  # which has more room than the budgets of padded passes
        steps.expect_more(len({*budgets, model.max_batch_tokens}) - len(budgets))
        budgets = sorted({*budgets, model.max_batch_tokens})
    for budget in budgets:
        with steps.step(f"{engine}, {budget} tokens"):
            if is_on_cpu:
                model.max_batch_tokens = budget
            else:  # loaded anew, because it prepares the shapes of its budget
                del model
                model = _load(settings, engine, budget)
            measured.texts_per_s[budget] = _texts_per_s(model, texts, size, settings.seconds)
    measured.one_text_s = _latency_ms(model, texts[:1], settings.seconds) / 1000
    return measured


def _load(settings: BenchSettings, engine: Engine, budget: int | Literal["auto"] = "auto") -> SentimentModel:
    free_device_memory()
    return SentimentModel.load(
        settings.model,
        dtype=engine.dtype,
        backend=engine.backend,
        max_batch_tokens=budget,
        tuning_s=max(settings.seconds, TUNING_S),
        **checkpoint_options(settings),
    )


def _engines(device: str) -> Iterator[Engine]:
    if device != "cpu":
        yield from (
            Engine("torch", "float32", True),
            Engine("torch", "auto", True),
            Engine("torch", "bfloat16", False),
            Engine("torch", "float16", False),
        )
        return
    yield from (Engine("onnx", "float32", True), Engine("onnx", "int8", False))
    if has_torch():
        from worker.model.torch.backends import has_bfloat16  # noqa: PLC0415 - the extra torch

        yield Engine("torch", "float32", True)
        if has_bfloat16():
            yield Engine("torch", "bfloat16", False)


def _budgets(model: SentimentModel) -> list[int]:
    return candidate_budgets(model.device.partition(":")[0], model.max_tokens)


def _micro_batch(device: str) -> int:
    """Texts of the micro-batches that engines are measured with, where the texts are not long."""
    return BATCH_TEXTS if device == "cpu" else CUDA_BATCH_TEXTS[-1]


def _at_most(count: int, model: SentimentModel, texts: Sequence[str]) -> int:
    """``count``, or how many of these texts have TOKENS_PER_TEXT · ``count`` tokens, estimated by the first of them."""
    some = texts[:TOKENS_PER_TEXT]
    tokens = sum(map(len, model.pieces(model.tokenize(some).ids)))
    return min(count, max(1, count * TOKENS_PER_TEXT * len(some) // max(1, tokens)))


def _texts_per_s(model: SentimentModel, texts: Sequence[str], size: int, seconds: float) -> float:
    batches = cycle([texts[begin : begin + size] for begin in range(0, len(texts), size)])
    model.score(next(batches))
    done, started = 0, time.perf_counter()
    while (passed := time.perf_counter() - started) < seconds or not done:
        batch = next(batches)
        model.score(batch)
        done += len(batch)
    return done / passed if passed >= seconds else done / (time.perf_counter() - started)


def _latency_ms(model: SentimentModel, texts: Sequence[str], seconds: float) -> float:
    """The median time from texts to results of a batch, in ms."""
    took: list[float] = []
    while not took or (sum(took) < seconds and len(took) < 200):
        started = time.perf_counter()
        model.score(texts)
        took.append(time.perf_counter() - started)
    return 1000 * sorted(took)[len(took) // 2]


def _texts(file: Path | None) -> list[str]:
    """The file's lines, else the reviews that ship with the package, repeated until they fill a micro-batch."""
    if file is None:
        texts = list(read_reviews())
    else:
        texts = [line for batch in file_lines(file) for line in batch if line and line.strip()]
        if not texts:
            raise WrongSetting(f"file = {file} has no line with a text; it should have one text a line")
    return list(islice(cycle(texts), max(BATCH_TEXTS, len(texts))))


def _print(report: BenchReport) -> None:
    console = Console()
    console.print(printable(f"{report.model} on {report.device}, {report.texts} texts"), markup=False)
    console.print(_speeds(report))
    console.print(_latencies(report))
    console.print("Settings for this machine, as lines of the file that --config names:\n", style="bold")
    console.print(report.settings() + "\n", markup=False, highlight=False)
    quick = max(report.engines, key=lambda each: each.speed)
    if not quick.engine.is_exact and quick.speed > MIN_GAIN * report.best.speed:
        console.print(
            f'dtype = "{quick.engine.dtype}" is {quick.speed / report.best.speed:.1f} times as fast; '
            f"{quick.agreement:.2%} of its labels are the same."
        )
    if report.times:
        console.print(_processes(report.times, available_cores()))
    hours = report.hours_per_million()
    console.print(f"A million texts take {3600 * hours:,.0f} s of this machine.")


def _processes(times: TextTimes, cores: int) -> str:
    tokenize, python, device = (f"{1e6 * seconds:.1f}" for seconds in times)
    sharing = processes_for_device(times, cores)
    what = (
        "keep this GPU busy" if sharing.is_device_full else f"are what {cores} cores can run; the GPU could serve more"
    )
    return (
        f"For a text, one worker process needs {tokenize} µs to tokenize, {python} µs of Python (estimated, without a "
        f"broker) and {device} µs of the GPU, side by side. {sharing.processes} of them {what}: about "
        f"{sharing.texts_per_s:,.0f} texts per second."
    )


def _speeds(report: BenchReport) -> Table:
    budgets = sorted({budget for each in report.engines for budget in each.texts_per_s})
    table = Table(
        Column("token budget", no_wrap=True), *map(str, budgets), "same labels", title="texts/s", title_justify="left"
    )
    for each in report.engines:
        cells = [f"{each.texts_per_s[b]:,.0f}" if b in each.texts_per_s else "" for b in budgets]
        table.add_row(str(each.engine), *cells, f"{each.agreement:.2%}")
    return table


def _latencies(report: BenchReport) -> Table:
    table = Table("texts in a batch", *map(str, report.latency_ms))
    table.add_row(f"ms, {report.best.engine}", *(f"{ms:.1f}" for ms in report.latency_ms.values()))
    return table
