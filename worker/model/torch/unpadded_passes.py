"""Passes of a model over texts without padding: token ids in host memory → logits.

- All that a pass needs goes over in one copy of int32 numbers, out of pinned memory into which numpy has packed them; the
  logits come back in one copy; between them lies one wait, for an event of the pass.
- A pass has buffers and a stream of its own. They serve the next pass only after that wait, so no copy under way is ever
  overwritten. Threads share nothing but the list of what is free, and take no lock: while one waits, another one packs.

What is CUDA's own is in ``CudaStream``; all else runs on a CPU, too.
"""

from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Final, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from worker.core.batching import ANY_PADDING, TokenIds
from worker.model.torch.unpadded import RowOfTexts

Logits = NDArray[np.float32]

MOST_TEXTS: Final = 65_535  # of a pass: the Flash kernel has a row of blocks for each, and CUDA has no more rows


class PassStream(Protocol):
    """Work of one pass after another on a device. One thread at a time uses it."""

    device: torch.device

    def host_memory(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """Memory of the host that can be copied from and to without anyone waiting."""

    def queue(self) -> AbstractContextManager[object]:
        """What this thread does on the device inside is queued on this stream."""

    def mark_end(self) -> None:
        """Marks the end of what has been queued so far."""

    def wait(self) -> None:
        """Blocks until the device has come to the mark, and lets other threads run meanwhile."""

    def settle(self) -> None:
        """Blocks until nothing is under way: after a failure, before buffers are given up."""


class CudaStream:
    """A PassStream of a CUDA device. Work on its default stream has to be complete before this one's begins."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._end = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]  # sleeps, and leaves the core to others

    def host_memory(self, *shape: int, dtype: torch.dtype) -> Tensor:
        return torch.zeros(shape, dtype=dtype, pin_memory=True)

    def queue(self) -> AbstractContextManager[object]:
        return torch.cuda.stream(self._stream)

    def mark_end(self) -> None:
        self._end.record(self._stream)

    def wait(self) -> None:
        self._end.synchronize()

    def settle(self) -> None:
        self._stream.synchronize()


class HostStream:
    """A PassStream of a CPU, which computes at once: for checks where there is no GPU."""

    device = torch.device("cpu")

    def host_memory(self, *shape: int, dtype: torch.dtype) -> Tensor:
        return torch.zeros(shape, dtype=dtype)

    def queue(self) -> AbstractContextManager[object]:
        return nullcontext()

    def mark_end(self) -> None:
        """The end is there already."""

    def wait(self) -> None:
        """Nothing is under way."""

    def settle(self) -> None:
        """Nothing is under way."""


class PassBuffers:
    """A stream, and the host memory of the pass on it: ``numbers`` to send, room for ``texts`` times ``labels`` logits."""

    def __init__(self, stream: PassStream, numbers: int, texts: int, labels: int) -> None:
        self.stream = stream
        self._numbers = stream.host_memory(numbers, dtype=torch.int32)
        self._logits = stream.host_memory(texts, labels, dtype=torch.float32)
        self.numbers: NDArray[np.int32] = self._numbers.numpy()
        self._answer: Logits = self._logits.numpy()

    def has_room(self, numbers: int, texts: int) -> bool:
        return len(self.numbers) >= numbers and len(self._answer) >= texts

    def send(self, end: int) -> Tensor:
        """The first ``end`` numbers, on the device. Their memory there belongs to the stream, and is freed by its order."""
        return self._numbers[:end].to(self.stream.device, non_blocking=True)

    def fetch(self, logits: Tensor, texts: int) -> None:
        self._logits[:texts].copy_(logits, non_blocking=True)
        self.stream.mark_end()

    def answer(self, texts: int) -> Logits:
        """Waits for the pass. The answer does not share the buffers' memory."""
        self.stream.wait()
        return self._answer[:texts].copy()


class UnpaddedPasses:
    """Token ids of N texts → logits (N, labels), in one pass, or one for each MOST_TEXTS.

    A call blocks until they are there; several threads may call at once.

    ``widths`` and ``pass_tokens``: as for PassRunner; a micro-batch goes in as few passes as its token budget allows.
    Raises what torch raises; after that the next pass has buffers of its own.
    """

    widths: Sequence[int] = ()
    pass_tokens: int = ANY_PADDING

    def __init__(
        self,
        forward: Callable[[RowOfTexts], Tensor],
        new_stream: Callable[[], PassStream],
        *,
        labels: int,
        padding: int,
    ) -> None:
        """``forward``: UnpaddedBert, or what is called as it is. ``padding``: the id that stands for a text without any."""
        self._forward = forward
        self._new_stream = new_stream
        self._labels = labels
        self._padding = padding
        self._free: deque[PassBuffers] = deque()  # its append and pop are atomic

    def __call__(self, ids: Sequence[TokenIds]) -> Logits:
        lengths = np.fromiter(map(len, ids), np.int32, len(ids))
        if not lengths.all():
            return self([each if len(each) else [self._padding] for each in ids])
        texts, tokens = len(ids), int(lengths.sum())
        if texts > MOST_TEXTS:
            return np.concatenate([self(ids[:MOST_TEXTS]), self(ids[MOST_TEXTS:])])
        end = size_of_row(texts, tokens)
        buffers = self._free_buffers(end, texts)
        try:
            pack_row(ids, lengths, buffers.numbers[:end])
            with torch.inference_mode(), buffers.stream.queue():
                row = RowOfTexts(buffers.send(end), texts, tokens, int(lengths.max()))
                buffers.fetch(self._forward(row), texts)
            logits = buffers.answer(texts)
        except BaseException:
            buffers.stream.settle()  # raises itself where the device is lost; these buffers are never used again
            raise
        self._free.append(buffers)
        return logits

    def _free_buffers(self, numbers: int, texts: int) -> PassBuffers:
        try:
            buffers = self._free.pop()
        except IndexError:
            return PassBuffers(self._new_stream(), _room(numbers), _room(texts), self._labels)
        if buffers.has_room(numbers, texts):
            return buffers
        return PassBuffers(buffers.stream, _room(numbers), _room(texts), self._labels)


def size_of_row(texts: int, tokens: int) -> int:
    """How many int32 numbers a RowOfTexts has."""
    return 4 * texts + 2 + tokens


def pack_row(ids: Sequence[TokenIds], lengths: NDArray[np.int32], numbers: NDArray[np.int32]) -> None:
    """Writes the numbers of a RowOfTexts, exactly as many as there is room for."""
    texts = len(ids)
    firsts, bounds, begins, own_lengths, tokens = np.split(numbers, np.cumsum((texts + 1, texts + 1, texts, texts)))
    firsts[:] = np.arange(texts + 1)
    bounds[0] = 0
    np.cumsum(lengths, out=bounds[1:])
    begins[:] = bounds[:-1]
    own_lengths[:] = lengths
    np.concatenate(ids, out=tokens, casting="unsafe")


def _room(size: int) -> int:
    """The next power of two: pinned memory is slow to get, so buffers grow a few times and then stay."""
    return 1 << max(10, (size - 1).bit_length())
