"""The ONNX graph beside torch's export of it: `python -m benchmarks.onnx_engine TEXTS.csv` writes
benchmarks/results/onnx_engine.{json,md}.

With random weights of the card's architecture, in float32 and in int8, on batches of equal and of mixed lengths, in turns:

- ours: ``worker.model.onnx``, built from the weights;
- exported: the same network written by torch's exporter, its int8 by ONNX Runtime's ``quantize_dynamic``;
- the floor: the batch's multiply-adds at the rate of torch's own products, and of oneDNN's packed ones.

All compute on one thread, and what counts is that thread's CPU time: another process's load does not add to it. With the
checkpoint that ships, the share of texts whose label is the same in int8 as in float32.

Needs the packages onnx and onnxscript for the exporter.
"""

import argparse
import json
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from benchmarks.common import machine, make_checkpoint, ratio, read_texts, write
from benchmarks.engine import Product, matrix_products
from worker.core.batching import cut_by_length
from worker.model.checkpoint import BUILTIN
from worker.model.onnx.architecture import Architecture, architecture_of
from worker.model.onnx.graph import IDS, LENGTHS, build_graph
from worker.model.onnx.quantization import needs_reduced_range
from worker.model.onnx.session import OnnxModel
from worker.model.onnx.weights import weights_of
from worker.model.torch.bert import NEVER, TOKEN_BY_TOKEN, BertClassifier, PlainLinear

TURN_S: Final = 0.01  # CPU seconds of one engine's turn, at least
BUDGET: Final = 512  # tokens of a batch
LENGTHS_MEASURED: Final = (16, 32, 48, 64, 128, 256, 512)
AGREEMENT_TEXTS: Final = 2_000
DTYPES: Final = ("float32", "int8")

Batch = tuple[NDArray[np.int64], NDArray[np.int64] | None]
Engine = Callable[[NDArray[np.int64], NDArray[np.int64] | None], NDArray[np.float32]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", type=Path, help="CSV file with a column text")
    parser.add_argument("--rounds", type=int, default=15, help="times that all take turns (default: 15)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    texts = read_texts(options.texts)
    with tempfile.TemporaryDirectory() as name, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        figures = measured(make_checkpoint(Path(name) / "card"), texts, options.rounds)
    figures["int8_labels_that_agree"] = agreement(texts[:AGREEMENT_TEXTS])
    write("onnx_engine", figures, table(figures))


def measured(checkpoint: Path, texts: Sequence[str], rounds: int) -> dict[str, Any]:
    """CPU seconds of each engine by batch and round, ratios of them, and the largest difference of a logit."""
    architecture, started = architecture_in(checkpoint), time.perf_counter()
    engines: dict[str, Engine] = {f"ours {dtype}": ours(checkpoint, is_int8=dtype == "int8") for dtype in DTYPES}
    built_s = time.perf_counter() - started
    for dtype in DTYPES:
        engines[f"exported {dtype}"] = Exported(checkpoint, is_int8=dtype == "int8")
    batches = equal_batches() | mixed_batches(checkpoint, texts)
    results: dict[str, Any] = {}
    for name, batch in batches.items():
        results[name] = figures_of(engines, batch, flops_of(architecture, *batch[0].shape), rounds)
        print(name, {key: value["median"] for key, value in results[name]["ratios"].items()}, flush=True)
    return {"machine": machine(None), "rounds": rounds, "both_built_s": round(built_s, 3), "batches": results}


def figures_of(engines: dict[str, Engine], batch: Batch, flops: float, rounds: int) -> dict[str, Any]:
    products = {name: each[-1] for name, each in matrix_products().items()}  # of the card's width
    took: dict[str, list[float]] = {name: [] for name in (*engines, *products)}
    for turn in range(rounds + 1):  # the first warms up
        names = list(engines)
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            took[name].append(cpu_s(partial(engines[name], *batch)))
        for name, product in products.items():
            took[name].append(floor_s(product, flops))
    took = {name: seconds[1:] for name, seconds in took.items()}
    ratios = {f"{dtype} over exported": ratio(took[f"exported {dtype}"], took[f"ours {dtype}"]) for dtype in DTYPES}
    ratios |= {f"float32 over {name}'s products": ratio(took[name], took["ours float32"]) for name in products}
    logits = {name: engine(*batch) for name, engine in engines.items()}
    return {
        "shape": list(batch[0].shape),
        "ms": {name: round(1000 * statistics.median(seconds), 3) for name, seconds in took.items()},
        "ratios": ratios,
        "largest_difference": {
            dtype: float(np.abs(logits[f"ours {dtype}"] - logits[f"exported {dtype}"]).max()) for dtype in DTYPES
        },
    }


def cpu_s(compute: Callable[[], object]) -> float:
    """CPU seconds of this thread for one call: the mean of as many as fill a turn, after one that does not count."""
    compute()
    count, started = 0, time.thread_time()
    while time.thread_time() - started < TURN_S:
        compute()
        count += 1
    return (time.thread_time() - started) / count


def floor_s(product: Product, flops: float) -> float:
    with torch.inference_mode():
        return cpu_s(product.compute) * flops / product.flops


# Batches.


def equal_batches() -> dict[str, Batch]:
    draw = np.random.default_rng(0)
    shapes = [(1, 16), (1, 48), *((max(1, BUDGET // length), length) for length in LENGTHS_MEASURED)]
    return {f"{texts} × {tokens}": (draw.integers(5, 29_000, (texts, tokens)), None) for texts, tokens in shapes}


def mixed_batches(checkpoint: Path, texts: Sequence[str]) -> dict[str, Batch]:
    """Three batches as the worker would cut them out of a micro-batch of 512 texts: a short, a middle and a long one."""
    ids = AutoTokenizer.from_pretrained(checkpoint)(list(texts[:512]), truncation=True, max_length=512)["input_ids"]
    batches = cut_by_length([len(each) for each in ids], BUDGET, BUDGET)
    uneven = sorted((padded([ids[place] for place in batch]) for batch in batches if len(batch) > 1), key=width)
    return {f"mixed, up to {width(batch)}": batch for batch in (uneven[0], uneven[len(uneven) // 2], uneven[-1])}


def width(batch: Batch) -> int:
    return batch[0].shape[1]


def padded(ids: Sequence[Sequence[int]]) -> Batch:
    lengths = np.array([len(each) for each in ids])
    rows = np.zeros((len(ids), lengths.max()), np.int64)
    for row, each in zip(rows, ids, strict=True):
        row[: len(each)] = each
    return rows, lengths


def flops_of(architecture: Architecture, texts: int, tokens: int) -> float:
    """Two for each multiply-add of the products, padding included; the last layer for the first token alone."""
    hidden, inner, earlier = architecture.hidden, architecture.intermediate, architecture.layers - 1
    layer = tokens * (4 * hidden**2 + 2 * hidden * inner) + 2 * tokens**2 * hidden
    last = tokens * 2 * hidden**2 + 2 * tokens * hidden + 2 * hidden**2 + 2 * hidden * inner
    return float(2 * texts * (earlier * layer + last + hidden**2 + hidden * architecture.labels))


# Engines.


def architecture_in(checkpoint: Path) -> Architecture:
    return architecture_of(json.loads((checkpoint / "config.json").read_text()))


def ours(checkpoint: Path, *, is_int8: bool) -> OnnxModel:
    file = {name: each.astype(np.float32) for name, each in load_file(checkpoint / "model.safetensors").items()}
    architecture = architecture_in(checkpoint)
    weights = weights_of(str(checkpoint), architecture, file)
    return OnnxModel(build_graph(architecture, weights, is_int8=is_int8))


class Exported:
    """The graph from torch's exporter, in ONNX Runtime with the same options as ours."""

    def __init__(self, checkpoint: Path, *, is_int8: bool) -> None:
        import onnxruntime

        model = AutoModelForSequenceClassification.from_pretrained(checkpoint, dtype=torch.float32).eval()
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        options.enable_mem_pattern = False
        with tempfile.TemporaryDirectory() as folder:
            file = exported_file(model, Path(folder), is_int8)
            self._session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])

    def __call__(self, ids: NDArray[np.int64], lengths: NDArray[np.int64] | None) -> NDArray[np.float32]:
        if lengths is None:
            lengths = np.full(len(ids), ids.shape[1])
        logits: NDArray[np.float32] = self._session.run(None, {IDS: ids, LENGTHS: lengths})[0]
        return logits


def exported_file(model: Any, folder: Path, is_int8: bool) -> Path:
    plain, int8 = folder / "plain.onnx", folder / "int8.onnx"
    torch.onnx.export(
        Module(model).eval(),
        (torch.randint(0, 2, (3, 7)), torch.tensor([7, 5, 2])),
        plain,
        input_names=[IDS, LENGTHS],
        output_names=["logits"],
        dynamic_shapes=(dict.fromkeys((0, 1), torch.export.Dim.DYNAMIC), {0: torch.export.Dim.DYNAMIC}),
        external_data=False,
        verbose=False,
    )
    if not is_int8:
        return plain
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantize_dynamic(
        plain,
        int8,
        op_types_to_quantize=["MatMul", "Gemm"],
        weight_type=QuantType.QInt8,
        per_channel=True,
        reduce_range=needs_reduced_range(),
    )
    return int8


class Module(nn.Module):
    """BertClassifier as a torch module, for torch's exporter takes nothing else."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self._bert = BertClassifier(model, linear=ApartLinear, fused_from=NEVER, order=TOKEN_BY_TOKEN)

    def forward(self, ids: Tensor, lengths: Tensor) -> Tensor:
        return self._bert(ids, lengths)


class ApartLinear(PlainLinear):
    """A product of its own for each layer of the same input. Parts of one product would be copied before they are used."""

    def __init__(self, weight: Tensor, bias: Tensor, is_gelu: bool = False, widths: Sequence[int] = ()) -> None:
        super().__init__(weight, bias, is_gelu, widths)
        parts = zip(torch.split(weight, self._widths), torch.split(bias, self._widths), strict=True)
        self._layers = [PlainLinear(*part, is_gelu) for part in parts]

    def each(self, rows: Tensor) -> Sequence[Tensor]:
        return [layer(rows) for layer in self._layers]


# Results.


def agreement(texts: Sequence[str]) -> float:
    """The share of texts whose label is the same in int8 as in float32, for the checkpoint that ships."""
    limit = architecture_in(BUILTIN).positions
    ids = AutoTokenizer.from_pretrained(BUILTIN)(list(texts), truncation=True, max_length=limit)["input_ids"]
    batches = [padded([ids[place] for place in batch]) for batch in cut_by_length([*map(len, ids)], BUDGET, BUDGET)]
    exact, int8 = (ours(BUILTIN, is_int8=is_int8) for is_int8 in (False, True))
    labels = [[engine(*batch).argmax(1) for batch in batches] for engine in (exact, int8)]
    return float(np.mean(np.concatenate(labels[0]) == np.concatenate(labels[1])))


def table(figures: dict[str, Any]) -> str:
    batches = figures["batches"]
    names = list(next(iter(batches.values()))["ratios"])
    return "\n".join([*heading(figures), *rows(batches, names), *footing(figures, names)]) + "\n"


def heading(figures: dict[str, Any]) -> Iterator[str]:
    yield (
        f"Machine: {figures['machine']['cpu']}; one thread, CPU time. A model of the card's architecture with random "
        f"weights; medians of {figures['rounds']} rounds in turn. Ratios above 1: ours is faster."
    )
    yield ""


def rows(batches: dict[str, Any], names: Sequence[str]) -> Iterator[str]:
    yield f"| batch (texts × tokens) | ours, ms: float32, int8 | {' | '.join(names)} |"
    yield "| --- " * (len(names) + 2) + "|"
    for name, batch in batches.items():
        ratios = " | ".join(f"{batch['ratios'][each]['median']:.2f}" for each in names)
        yield f"| {name} | {batch['ms']['ours float32']:.2f}, {batch['ms']['ours int8']:.2f} | {ratios} |"


def footing(figures: dict[str, Any], names: Sequence[str]) -> Iterator[str]:
    batches = figures["batches"].values()
    medians = {name: statistics.median(batch["ratios"][name]["median"] for batch in batches) for name in names}
    yield f"| median | | {' | '.join(f'{median:.2f}' for median in medians.values())} |"
    yield ""
    differences = {dtype: max(batch["largest_difference"][dtype] for batch in batches) for dtype in DTYPES}
    yield (
        "Largest difference of a logit from the exported graph: "
        + ", ".join(f"{dtype} {difference:.1e}" for dtype, difference in differences.items())
        + f". Both graphs and sessions of ours are built in {figures['both_built_s']} s together. The checkpoint that "
        f"ships: {figures['int8_labels_that_agree']:.2%} of {AGREEMENT_TEXTS:,} labels in int8 are those of float32."
    )


if __name__ == "__main__":
    main()
