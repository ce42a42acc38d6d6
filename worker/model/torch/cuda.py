"""Passes of a model on a CUDA device: token ids in host memory → logits, with the host and the device at work at once.

- Shapes are few: widths are powers of two and half as much again, rows the same way, so that each can have a CUDA graph.
- What goes over is one vector of int32: the lengths, then the ids of all texts without padding. The device pads.
- A pass is dispatched in three steps that wait for nothing: copy in on a stream of its own, graph (or the plain forward
  where there is none), copy out. The one wait is for the pass's own event. Several threads may be in a pass: while one
  waits, the next packs and dispatches, and the device has no gap.
- Graphs share one pool of memory, which grows with the largest of them only, and has a bound.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from worker.core.batching import TokenIds
from worker.model.torch.bert import BertClassifier, Forward

log = logging.getLogger(__name__)

Logits = NDArray[np.float32]

SMALLEST_WIDTH: Final = 16
PASSES: Final = 2  # one is packed and sent while another is computed
A_PASS_TOKENS: Final = 2_048  # computed in the time that one more pass takes to be sent and fetched
GRAPHS: Final = 256  # the shapes of the largest budget that is tried
GRAPH_MEMORY: Final = 1 / 8  # of what is free at the start
GRAPH_PATIENCE_S: Final = 15.0
NEAR: Final = 0.05  # the share of texts, those with the closest labels, from which the density of ties is taken


# Shapes.


class Shape(NamedTuple):
    """Of a pass: so many texts, each padded to so many tokens."""

    rows: int
    width: int


class Shapes:
    """The shapes that passes have, for texts of at most ``longest`` tokens and at most ``budget`` tokens a pass. Pure."""

    def __init__(self, longest: int, budget: int) -> None:
        self.widths = (*_steps(SMALLEST_WIDTH, longest), longest)
        self._budget = budget

    def all(self) -> list[Shape]:
        """The largest first: what a smaller one needs of memory, a larger one has left."""
        shapes = [Shape(rows, width) for width in self.widths for rows in self._rows(width)]
        return sorted(shapes, key=lambda shape: (-shape.rows * shape.width, -shape.width))

    def of(self, count: int, length: int) -> Shape:
        """The smallest shape for so many texts of such a length; beyond the budget it has just as many rows."""
        width = next((width for width in self.widths if width >= length), length)
        return Shape(next((rows for rows in self._rows(width) if rows >= count), count), width)

    def all_of(self, batches: Sequence[Sequence[TokenIds]]) -> list[Shape]:
        """The shapes of these device batches, the largest first."""
        needed = {self.of(len(batch), max(map(len, batch))) for batch in batches}
        return [shape for shape in self.all() if shape in needed]

    def _rows(self, width: int) -> tuple[int, ...]:
        most = max(1, self._budget // width)
        return (*_steps(1, most), most)


def _steps(first: int, end: int) -> list[int]:
    """Powers of two and half as much again, from ``first``, itself one, to below ``end``: a step adds half at the most."""
    steps = []
    step = first
    while step < end:
        steps.append(step)
        half_more = step + step // 2
        if step >= 2 and half_more < end:
            steps.append(half_more)
        step *= 2
    return steps


# The wire.


def pack(ids: Sequence[TokenIds], shape: Shape, wire: NDArray[np.int32]) -> int:
    """Writes ``shape.rows`` lengths, 0 for a row without a text, and then all ids into ``wire``. Answers with its end."""
    lengths = wire[: shape.rows]
    lengths[: len(ids)] = np.fromiter(map(len, ids), np.int32, len(ids))
    lengths[len(ids) :] = 0
    end = shape.rows + int(lengths.sum())
    np.concatenate(ids, out=wire[shape.rows : end], casting="unsafe")
    return end


def unpacked(wire: Tensor, shape: Shape, padding: int) -> tuple[Tensor, Tensor]:
    """Ids (rows, width) and lengths (rows) of a packed vector, on its device. What lies behind its end does not matter.

    A row without a text is one token of padding: attention to nothing would be no number.
    """
    rows, width = shape
    lengths = wire[:rows]
    columns = torch.arange(width, device=wire.device)
    begins = lengths.cumsum(0) - lengths
    places = (begins[:, None] + columns).clamp_(max=rows * width - 1)
    ids = wire[rows : rows + rows * width].index_select(0, places.view(-1)).view(rows, width)
    return ids.masked_fill_(columns >= lengths[:, None], padding), lengths.clamp(min=1)


# Passes.


class Slot(Protocol):
    """The buffers of one pass under way. ``wire``: what ``pack`` fills, in host memory."""

    wire: NDArray[np.int32]


class PassDevice(Protocol):
    """Where passes run. All but ``slot`` may be called by several threads at once."""

    def slot(self, shape: Shape) -> Any:
        """Buffers for a pass of this shape; for smaller ones, too."""

    def dispatch(self, slot: Any, shape: Shape, end: int) -> None:
        """Queues the pass over the first ``end`` numbers of the wire, without waiting for anything."""

    def fetch(self, slot: Any, count: int) -> Logits:
        """Waits for the pass, answers with the logits of its first ``count`` rows."""

    def settle(self) -> None:
        """Waits until nothing is under way: after a failure, before buffers are used again."""


class Passes:
    """N token lists → logits (N, labels). Blocks until they are there; for any number of threads.

    ``exact``: another way for texts whose logits are no finite numbers, which half precision can do to a text that single
    precision does not; None if there is no other.
    """

    def __init__(self, pass_device: PassDevice, shapes: Shapes, exact: "Passes | None" = None) -> None:
        self.widths: Sequence[int] = shapes.widths
        self.pass_tokens = A_PASS_TOKENS
        self._pass_device = pass_device
        self._shapes = shapes
        self._exact = exact
        self._slots: list[Any] = []
        self._lock = threading.Lock()

    def __call__(self, ids: Sequence[TokenIds]) -> Logits:
        shape = self._shapes.of(len(ids), max(map(len, ids)))
        slot = self._free_slot(shape)
        try:
            self._pass_device.dispatch(slot, shape, pack(ids, shape, slot.wire))
            logits = self._pass_device.fetch(slot, len(ids))
        except BaseException:
            self._pass_device.settle()  # raises itself where the device is lost; the slot is then never used again
            raise
        self._slots.append(slot)
        return self._mended(ids, logits)

    def _free_slot(self, shape: Shape) -> Any:
        with self._lock:
            slot = self._slots.pop() if self._slots else None
            if slot is None or len(slot.wire) < shape.rows * (shape.width + 1):
                slot = self._pass_device.slot(shape)
            return slot

    def _mended(self, ids: Sequence[TokenIds], logits: Logits) -> Logits:
        broken = np.flatnonzero(~np.isfinite(logits).all(axis=1))
        if self._exact is not None and len(broken):
            logits[broken] = self._exact([ids[row] for row in broken.tolist()])
        return logits


# The device.


class CapturedGraph(NamedTuple):
    """A captured graph, and the tensor that its replay fills."""

    run: Callable[[], None]
    output: Tensor


class Graphs:
    """Which shapes have a graph. Knows no CUDA: its caller says how a graph is captured and how much memory that takes."""

    def __init__(self) -> None:
        self._graphs: dict[Shape, CapturedGraph] = {}

    def __len__(self) -> int:
        return len(self._graphs)

    def get(self, shape: Shape) -> CapturedGraph | None:
        return self._graphs.get(shape)

    def fill(
        self,
        shapes: Iterable[Shape],
        *,
        needs: Callable[[Shape], int],
        capture: Callable[[Shape], CapturedGraph],
        most_bytes: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Captures one shape after another, the largest first, as long as number, memory and patience suffice.

        ``needs``: the bytes that a pass takes. As graphs share their memory, it suffices that each fits. What fails to be
        captured has no graph, and after it nothing is tried.
        """
        deadline = clock() + GRAPH_PATIENCE_S
        for shape in shapes:
            if len(self) >= GRAPHS or clock() > deadline:
                return
            try:
                if needs(shape) <= most_bytes:
                    self._graphs[shape] = capture(shape)
            except Exception as error:  # noqa: BLE001 - torch raises what it likes; there is the plain forward
                log.warning(
                    "no CUDA graph can be captured: the plain forward is used", extra={"error": str(error)[:200]}
                )
                return


class CudaSlot:
    """Pinned buffers and their counterpart on the device, and the events of one pass."""

    def __init__(self, shape: Shape, labels: int, device: torch.device) -> None:
        size = shape.rows * (shape.width + 1)
        self._pinned = torch.zeros(size, dtype=torch.int32, pin_memory=True)
        self.wire: NDArray[np.int32] = self._pinned.numpy()
        self.sent = torch.zeros(size, dtype=torch.int32, device=device)
        self.answer = torch.zeros(size // 2, labels, pin_memory=True)  # a shape has two numbers a row or more
        self.is_sent = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self.is_done = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]  # sleeps, and leaves the core to the tokenizer

    def send(self, end: int, stream: Any) -> None:
        with torch.cuda.stream(stream):
            self.sent[:end].copy_(self._pinned[:end], non_blocking=True)
            self.is_sent.record(stream)


class CudaPassDevice:
    """A CUDA device: a stream for copies to it, one for passes."""

    def __init__(self, forward: Forward, device: torch.device, *, labels: int, padding: int) -> None:
        self._forward = forward
        self._device = device
        self._labels = labels
        self._padding = padding
        self._copies = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._passes = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._lock = threading.Lock()
        self._graphs = Graphs()
        self._input = torch.empty(0, dtype=torch.int32)

    def capture(self, shapes: Sequence[Shape]) -> None:
        """Captures graphs for these shapes. Blocks for some seconds; before the first pass."""
        free, _ = torch.cuda.mem_get_info(self._device)
        size = max(shape.rows * (shape.width + 1) for shape in shapes)
        self._input = torch.zeros(size, dtype=torch.int32, device=self._device)
        pool = torch.cuda.graph_pool_handle()
        with torch.inference_mode(), torch.cuda.device(self._device):
            torch.cuda.synchronize(self._device)
            self._graphs.fill(
                shapes,
                needs=self._needs,
                capture=lambda shape: self._captured(shape, pool),
                most_bytes=int(free * GRAPH_MEMORY),
            )
            torch.cuda.synchronize(self._device)
        log.info("captured CUDA graphs", extra={"graphs": len(self._graphs), "of": len(shapes)})

    def slot(self, shape: Shape) -> CudaSlot:
        with torch.cuda.device(self._device):
            slot = CudaSlot(shape, self._labels, self._device)
            torch.cuda.current_stream().synchronize()  # of the zeros, which the other streams do not wait for
        return slot

    def dispatch(self, slot: CudaSlot, shape: Shape, end: int) -> None:
        with torch.inference_mode(), torch.cuda.device(self._device):
            slot.send(end, self._copies)
            with self._lock, torch.cuda.stream(self._passes):
                self._passes.wait_event(slot.is_sent)
                output = self._output(slot, shape, end)
                slot.answer[: shape.rows].copy_(output, non_blocking=True)
                slot.is_done.record(self._passes)

    def fetch(self, slot: CudaSlot, count: int) -> Logits:
        slot.is_done.synchronize()
        answer: Logits = slot.answer[:count].numpy().copy()
        return answer

    def settle(self) -> None:
        torch.cuda.synchronize(self._device)

    def _output(self, slot: CudaSlot, shape: Shape, end: int) -> Tensor:
        replay = self._graphs.get(shape)
        if replay is None:
            return self._computed(slot.sent, shape)
        self._input[:end].copy_(slot.sent[:end], non_blocking=True)
        replay.run()
        return replay.output

    def _computed(self, wire: Tensor, shape: Shape) -> Tensor:
        return self._forward(*unpacked(wire, shape, self._padding)).float()

    def _needs(self, shape: Shape) -> int:
        """By a pass, which also has its kernels loaded and their workspaces made before a graph is captured."""
        torch.cuda.reset_peak_memory_stats(self._device)
        before = torch.cuda.memory_allocated(self._device)
        with torch.cuda.stream(self._passes):
            self._computed(self._input, shape)
        self._passes.synchronize()
        return torch.cuda.max_memory_allocated(self._device) - before

    def _captured(self, shape: Shape, pool: Any) -> CapturedGraph:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(self._passes):
            graph.capture_begin(pool=pool, capture_error_mode="thread_local")
            try:
                output = self._computed(self._input, shape)
            finally:
                graph.capture_end()
        return CapturedGraph(graph.replay, output)


def passes_on(
    device: torch.device,
    forward: Forward,
    exact: Forward | None,
    *,
    longest: int,
    budget: int,
    labels: int,
    padding: int,
    batches: Sequence[Sequence[TokenIds]] | None = None,
) -> Passes:
    """Passes of a model on its device, with graphs for a BertClassifier; ``exact``: for what that gives no number for.

    ``longest``: the model's maximum; ``budget``: tokens in a pass; ``padding``: the id of it. Only the shapes of ``batches``
    have graphs, if they are given. Blocks for some seconds if they are not.
    """
    shapes = Shapes(longest, budget)
    pass_device = CudaPassDevice(forward, device, labels=labels, padding=padding)
    captured = shapes.all() if batches is None else shapes.all_of(batches)
    if isinstance(forward, BertClassifier) and captured:
        pass_device.capture(captured)
    if exact is None:
        return Passes(pass_device, shapes)
    return Passes(pass_device, shapes, Passes(CudaPassDevice(exact, device, labels=labels, padding=padding), shapes))


# Half precision.


def expected_agreement(exact: Logits, other: Logits) -> float:
    """The share of texts, like those of the sample, that keep their label; logits (N, labels) of the same N texts.

    To count labels that change would need thousands of texts to tell 99.9 % from 99 %. But a label changes where its lead
    over the second is smaller than what the other arithmetic takes from it, and both can be measured on every text: the
    density of leads near zero, from the closest twentieth of the texts, times the mean change of a lead. That errs to the
    careful side by half, as half of the changes widen the lead. 0 where a logit is not finite.
    """
    if not (np.isfinite(exact).all() and np.isfinite(other).all()):
        return 0.0
    if exact.shape[1] == 1:
        return 1.0
    order = exact.argsort(axis=1)
    rows = np.arange(len(exact))
    first, second = order[:, -1], order[:, -2]
    leads = exact[rows, first] - exact[rows, second]
    changes = np.abs(leads - (other[rows, first] - other[rows, second]))
    changed = float((exact.argmax(axis=1) != other.argmax(axis=1)).mean())
    near = float(np.quantile(leads, NEAR))
    expected = float(changes.mean()) * NEAR / near if near > 0 else 1.0
    # A single change in a sample of hundreds is no sign yet; two and more, beyond what is expected, are.
    return 1.0 - max(min(expected, 1.0), changed - 1 / len(exact))
