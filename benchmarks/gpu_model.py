"""The parts of benchmarks/gpu.py that need no Kafka: whether the model is right on this device, and how fast it is."""

import asyncio
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoModelForSequenceClassification

from benchmarks.engine import flops_per_text
from worker.core.batching import cut_by_length
from worker.core.sentiment import to_sentiments
from worker.model.autotune import best_batch_texts, shortest_run_s
from worker.model.checkpoint import BUILTIN
from worker.model.runner import CudaPass, padded_ids
from worker.model.sentiment_model import SentimentModel
from worker.model.torch.unpadded import UnpaddedBert, attend_by_text
from worker.model.torch.unpadded_passes import HostStream, UnpaddedPasses

WAYS: Final[tuple[CudaPass, ...]] = ("padded", "unpadded")
RIGHT_TOKENS = 16_384  # in one pass, where only right and wrong count: few shapes have to be prepared
PADDED_TOKENS = 65_536  # in one pass, padded: the best before
KERNELS = 12  # that are named


def load(checkpoint: str | Path, device: str, dtype: str, way: CudaPass = "padded", **more: Any) -> SentimentModel:
    """A model whose passes go one of the WAYS; on a CPU there is but one."""
    return SentimentModel.load(str(checkpoint), device=device, dtype=dtype, backend="torch", cuda_pass=way, **more)


# Right.


def right(device: str, texts: Sequence[str]) -> dict[str, Any]:
    """Labels and logits of each way against transformers' own model in float32, text for text; the checkpoint builtin."""
    model = load("builtin", device, "float32", max_batch_tokens=RIGHT_TOKENS)
    ids = model.tokenize(texts).ids
    wanted = transformers_logits(device, ids)[:, model._columns]
    found = {"padded, float32": model.batch_logits(ids)}
    if device == "cpu":
        found["unpadded, float32"] = unpadded_on_cpu(ids)[:, model._columns]
    half = "float16" if device != "cpu" else "bfloat16"
    for way in WAYS:
        model = load("builtin", device, half, way, max_batch_tokens=RIGHT_TOKENS)
        if model.cuda_pass == way:
            found[f"{way}, {half}"] = model.batch_logits(ids)
    return {
        "texts": len(texts),
        "half": half,
        "against_float32": {name: compared(wanted, logits) for name, logits in found.items()},
    }


def transformers_logits(device: str, ids: Sequence[Any]) -> NDArray[np.float32]:
    """Logits (N, labels) of the token ids of N texts, by transformers alone, in float32."""
    torch.set_float32_matmul_precision("highest")
    model = AutoModelForSequenceClassification.from_pretrained(BUILTIN, dtype=torch.float32).to(device).eval()
    logits = np.empty((len(ids), model.config.num_labels), dtype=np.float32)
    with torch.inference_mode():
        for batch in cut_by_length([len(each) for each in ids], RIGHT_TOKENS, RIGHT_TOKENS):
            padded, lengths = padded_ids([ids[index] for index in batch], 0)
            mask = (np.arange(padded.shape[1]) < lengths[:, None]).astype(np.int64)
            given = {"input_ids": padded, "attention_mask": mask}
            tensors = {name: torch.from_numpy(array).to(device) for name, array in given.items()}
            logits[batch] = model(**tensors).logits.float().cpu().numpy()
    return logits


def unpadded_on_cpu(ids: Sequence[Any]) -> NDArray[np.float32]:
    """Logits (N, labels) of the unpadded pass, with attention text by text in place of the device's: for a rehearsal."""
    model = AutoModelForSequenceClassification.from_pretrained(BUILTIN, dtype=torch.float32).eval()
    forward = UnpaddedBert(model, attend_by_text)
    run = UnpaddedPasses(forward, HostStream, labels=model.config.num_labels, padding=0)
    return run(ids)


def compared(wanted: NDArray[np.float32], logits: NDArray[np.float32]) -> dict[str, float]:
    changed = int((wanted.argmax(1) != logits.argmax(1)).sum())
    return {
        "labels_that_agree_percent": round(100 * (1 - changed / len(wanted)), 4),
        "other_labels": changed,
        "largest_difference_of_a_logit": float(np.abs(wanted - logits).max()),
    }


# Engine.


def engine(checkpoint: Path, device: str, dtype: str, texts: Sequence[str], window: int, rounds: int) -> dict[str, Any]:
    """Texts per second of each way, from token ids and from text, in micro-batches of `window`; where the time goes."""
    peak, flops = matmul_peak(device, getattr(torch, dtype)), flops_per_text(checkpoint, texts[:2_048])
    figures: dict[str, Any] = {
        "texts": len(texts),
        "dtype": dtype,
        "window": window,
        "peak_tflops": round(peak / 1e12, 2),
        "floor_texts_per_s": round(peak / flops),
        "ways": {},
    }
    for way in WAYS:
        began = time.perf_counter()
        budget = PADDED_TOKENS if way == "padded" and device != "cpu" else "auto"
        model = load(checkpoint, device, dtype, way, max_batch_tokens=budget)
        loading_s = round(time.perf_counter() - began, 2)
        if model.cuda_pass == way:
            figures["ways"][way] = {"load_s": loading_s, **speeds(model, texts, window, rounds)}
    return figures


def speeds(model: SentimentModel, texts: Sequence[str], window: int, rounds: int) -> dict[str, Any]:
    windows = [list(texts[begin : begin + window]) for begin in range(0, len(texts), window)]
    ids = [model.tokenize(each).ids for each in windows]
    ways: dict[str, Callable[[], object]] = {
        "from ids": lambda: [model.batch_logits(each) for each in ids],
        "from text": lambda: asyncio.run(overlapped(model, windows)),
        "tokenizing alone": lambda: [model.tokenize(each) for each in windows],
    }
    found: dict[str, list[int]] = {name: [] for name in ways}
    for turn in range(rounds + 1):  # the first warms up
        for name, way in ways.items():
            began = time.perf_counter()
            way()
            if turn:
                found[name].append(round(len(texts) / (time.perf_counter() - began)))
    seconds = model.batch_seconds(texts[:window])
    return {
        "max_batch_tokens": model.max_batch_tokens,
        "has_fallen_back": getattr(model._run, "has_fallen_back", False),
        "memory_mb": round(model.memory_bytes() / 1e6),
        "texts_per_s": found,
        "medians": {name: statistics.median(values) for name, values in found.items()},
        "by_micro_batch": {str(size): round(size / took_s) for size, took_s in seconds.items()},
        "auto_max_batch_texts": best_batch_texts(seconds),
        "ms_of_a_window": where_time_goes(model, windows[0]),
        "device": device_time(model, ids[0]),
    }


async def overlapped(model: SentimentModel, windows: Sequence[list[str]]) -> None:
    """The next micro-batch is tokenized while one is computed, as the worker does it."""
    ids = model.tokenize(windows[0]).ids
    for following in [*windows[1:], None]:
        coming = asyncio.to_thread(model.tokenize, following or [])
        _, tokens = await asyncio.gather(asyncio.to_thread(model.batch_logits, ids), coming)
        ids = tokens.ids


def where_time_goes(model: SentimentModel, window: list[str]) -> dict[str, float]:
    """Milliseconds for one micro-batch, each step alone, and the passes together."""
    ids = model.tokenize(window).ids
    lengths = [len(each) for each in ids]

    def cut() -> list[list[int]]:
        return cut_by_length(lengths, model.max_batch_tokens, model.pass_tokens, model.widths)

    batches, logits = cut(), model.batch_logits(ids)
    steps: dict[str, Callable[[], object]] = {
        "tokenize": lambda: model.tokenize(window),
        "cut": cut,
        "passes, one thread": lambda: [model.logits([ids[index] for index in batch]) for batch in batches],
        "passes, as the engine does": lambda: model.batch_logits(ids),
        "logits to sentiments": lambda: to_sentiments(logits, model.labels),
    }
    took = {name: round(1000 * shortest_run_s(step), 3) for name, step in steps.items()}
    return {**took, "texts": len(window), "tokens": sum(lengths), "passes": len(batches)}


def device_time(model: SentimentModel, ids: Sequence[Any]) -> dict[str, Any]:
    """Milliseconds of the device for one micro-batch, without gaps, and its longest kernels; nothing on a CPU."""
    if model.device == "cpu":
        return {}
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        model.batch_logits(ids)
        torch.cuda.synchronize()
    rows = sorted(((row.self_device_time_total / 1000, row.key) for row in profiled.key_averages()), reverse=True)
    kernels = {name[:80]: round(ms, 3) for ms, name in rows[:KERNELS] if ms > 0}
    return {"ms": round(sum(ms for ms, _ in rows), 3), "kernels_ms": kernels}


def matmul_peak(device: str, dtype: torch.dtype) -> float:
    """Operations per second of large square products."""
    size = 8_192 if device != "cpu" else 1_024
    matrix = torch.randn(size, size, device=device, dtype=dtype)

    def product() -> None:
        for _ in range(4):
            torch.mm(matrix, matrix)
        if device != "cpu":
            torch.cuda.synchronize(device)

    return 4 * 2 * size**3 / shortest_run_s(product)
