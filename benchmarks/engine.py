"""The engine without Kafka: `python -m benchmarks.engine TEXTS.csv` writes benchmarks/results/engine.{json,md}.

With a randomly initialised model of the card's architecture, taking turns in every round:

- card loop: the card's own function, one text after another;
- pipeline: the Hugging Face pipeline with batch_size 32, texts in order of arrival;
- ours, for each backend and number type: micro-batches of 512 texts, tokenized, sorted and scored;
- the floor: the multiply-adds that the function needs, at the rate of torch's products of matrices.

And with a trained checkpoint, on all texts: labels that agree with the card's function, and the largest difference of a
probability.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoConfig, AutoTokenizer, pipeline

from benchmarks.common import WINDOW, machine, make_checkpoint, ratio, read_texts, write
from benchmarks.worker import TORCH_THREADS, CardLoop
from worker.commands.load_model import prepare_process
from worker.model.checkpoint import BUILTIN
from worker.model.sentiment_model import SentimentModel
from worker.model.torch.bert import PackedLinear, PlainLinear

Speed = Callable[[Sequence[str]], float]
PEAK_S = 1.0  # of each product in a turn


def main() -> None:
    options = parsed_options()
    texts = read_texts(options.texts)
    with tempfile.TemporaryDirectory() as name:
        os.environ["XDG_CACHE_HOME"] = name
        figures = measured(make_checkpoint(Path(name) / "card"), texts, options.rounds)
        figures["agreement"] = {"texts": len(texts), "engines": agreement(texts)}
    write("engine", figures, table(figures))


def parsed_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", type=Path, help="CSV file with a column text")
    parser.add_argument("--rounds", type=int, default=5, help="times that all take turns (default: 5)")
    return parser.parse_args()


def engines() -> dict[str, dict[str, str]]:
    """What to load for each of ours."""
    return {
        "torch float32": {"backend": "torch"},
        "torch bfloat16": {"backend": "torch", "dtype": "bfloat16"},
        "onnx float32": {"backend": "onnx"},
        "onnx int8": {"dtype": "int8"},
    }


def measured(checkpoint: Path, texts: Sequence[str], rounds: int) -> dict[str, Any]:
    """Texts per second of each by round, their ratios to the card's loop, and the floor."""
    prepare_process()
    card, hugging_face = CardLoop(checkpoint), HuggingFacePipeline(checkpoint)
    ours = {name: SentimentModel.load(str(checkpoint), device="cpu", **wanted) for name, wanted in engines().items()}
    ways: dict[str, tuple[Speed, int]] = {"card loop": (card.speed, 256), "pipeline": (hugging_face.speed, 256)}
    ways |= {name: (speed_of(model), 2_048) for name, model in ours.items()}
    speeds: dict[str, list[float]] = {name: [] for name in ways}
    products, flops = matrix_products(), flops_per_text(checkpoint, texts[: 4 * WINDOW])
    peaks: dict[str, list[float]] = {name: [] for name in products}
    for turn in range(rounds + 1):  # the first warms up
        for name, (speed, count) in ways.items():
            begin = turn * count % (len(texts) - count)
            taken = speed(texts[begin : begin + count])
            if turn:
                speeds[name].append(taken)
        if turn:
            torch.set_num_threads(TORCH_THREADS)
            for name, each in products.items():
                peaks[name].append(max(map(sustained_flops, each)))
        print({name: round(values[-1]) for name, values in speeds.items() if values}, flush=True)
    sample = texts[:1_000]
    wanted = card.probabilities(sample)
    floors = {name: [peak / flops for peak in each] for name, each in peaks.items()}
    return {
        "machine": machine(None),
        "threads": next(iter(ours.values())).passes,
        "texts_per_s": {name: [round(value, 1) for value in values] for name, values in speeds.items()},
        "over_card_loop": {name: ratio(values, speeds["card loop"]) for name, values in speeds.items()},
        "budgets": {name: model.max_batch_tokens for name, model in ours.items()},
        "peak_gflops": {name: [round(peak / 1e9, 1) for peak in each] for name, each in peaks.items()},
        "floor_texts_per_s": {name: [round(floor, 1) for floor in each] for name, each in floors.items()},
        "over_floor": {name: {by: ratio(speeds[name], floor) for by, floor in floors.items()} for name in ours},
        "difference": {name: compared(wanted, model.get_sentiment(sample, "proba")) for name, model in ours.items()},
    }


class HuggingFacePipeline:
    def __init__(self, checkpoint: Path) -> None:
        self._pipeline = pipeline(
            "text-classification",
            model=str(checkpoint),
            device="cpu",
            dtype=torch.float32,
            function_to_apply="sigmoid",
        )

    def speed(self, texts: Sequence[str]) -> float:
        torch.set_num_threads(TORCH_THREADS)
        started = time.perf_counter()
        self._answers(texts)
        return len(texts) / (time.perf_counter() - started)

    def probabilities(self, texts: Sequence[str]) -> NDArray[np.float64]:
        labels = self._pipeline.model.config.id2label.values()
        scores = ({each["label"]: each["score"] for each in answer} for answer in self._answers(texts))
        return np.array([[of[label] for label in labels] for of in scores])

    def _answers(self, texts: Sequence[str]) -> list[list[dict[str, Any]]]:
        answers: list[list[dict[str, Any]]] = self._pipeline(list(texts), batch_size=32, top_k=None, truncation=True)
        return answers


def speed_of(model: SentimentModel) -> Speed:
    def speed(texts: Sequence[str]) -> float:
        started = time.perf_counter()
        for begin in range(0, len(texts), WINDOW):
            model.score(texts[begin : begin + WINDOW])
        return len(texts) / (time.perf_counter() - started)

    return speed


def compared(wanted: NDArray[Any], given: NDArray[Any]) -> dict[str, float]:
    return {
        "labels_that_agree": round(float((wanted.argmax(1) == given.argmax(1)).mean()), 4),
        "largest_difference": float(np.abs(wanted - given).max()),
    }


def agreement(texts: Sequence[str]) -> dict[str, dict[str, float]]:
    """Of each with the card's own function, for the checkpoint that ships."""
    wanted = CardLoop(BUILTIN).probabilities(texts)
    given = {"pipeline": HuggingFacePipeline(BUILTIN).probabilities(texts)}
    for name, settings in engines().items():
        given[name] = SentimentModel.load("builtin", device="cpu", normalize="none", **settings).get_sentiment(
            texts, "proba"
        )
    return {name: compared(wanted, each) for name, each in given.items()}


# The floor.


def flops_per_text(checkpoint: Path, texts: Iterable[str]) -> float:
    """Two for each multiply-add of the products; the last layer for [CLS] alone; no padding."""
    config = AutoConfig.from_pretrained(checkpoint)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    lengths = np.array([len(ids) for ids in tokenizer(list(texts), truncation=True, max_length=512)["input_ids"]])
    width, inner, earlier = config.hidden_size, config.intermediate_size, config.num_hidden_layers - 1
    layer = lengths * (4 * width**2 + 2 * width * inner) + 2 * lengths**2 * width
    last = lengths * 2 * width**2 + 2 * lengths * width + 2 * width**2 + 2 * width * inner
    head = width**2 + width * config.num_labels
    return float(2 * (earlier * layer + last + head).mean())


class Product(NamedTuple):
    """A product of float32 matrices, and its operations."""

    compute: Callable[[], object]
    flops: float


def matrix_products() -> dict[str, list[Product]]:
    """Torch's own, of several sizes, and one with oneDNN's packed weights."""
    squares = {size: torch.randn(size, size) for size in (1_024, 2_048)}
    weight, bias, rows = torch.randn(936, 312), torch.randn(936), torch.randn(4_096, 312)
    flops = 2 * 4_096 * 312 * 936
    plain, packed = PlainLinear(weight, bias), PackedLinear(weight, bias)
    own = [Product(partial(torch.mm, matrix, matrix), 2 * size**3) for size, matrix in squares.items()]
    return {"torch": [*own, Product(partial(plain, rows), flops)], "oneDNN": [Product(partial(packed, rows), flops)]}


def sustained_flops(product: Product) -> float:
    """Operations per second, over a second and not at best: an engine's turn takes seconds, too."""
    count, started = 0, time.perf_counter()
    with torch.inference_mode():
        while time.perf_counter() - started < PEAK_S:
            product.compute()
            count += 1
        return count * product.flops / (time.perf_counter() - started)


def table(figures: dict[str, Any]) -> str:
    floors = [
        f"{name} {statistics.median(figures['peak_gflops'][name]):.0f} GFLOP/s, {statistics.median(floor):.0f} texts/s"
        for name, floor in figures["floor_texts_per_s"].items()
    ]
    lines = [
        f"Machine: {figures['machine']['cpu']}, {figures['machine']['cores']} cores; {figures['threads']} threads. A model "
        "of the card's architecture with random weights, unique texts, medians of "
        f"{len(figures['texts_per_s']['card loop'])} rounds in turn (least to most).",
        "",
        "| engine | texts/s | over the card's loop | over the floor | labels that agree | largest difference |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, values in figures["texts_per_s"].items():
        over = figures["over_card_loop"][name]
        difference = figures["difference"].get(name)
        compared_cells = (
            f"{difference['labels_that_agree']} | {difference['largest_difference']:.1e}" if difference else "|"
        )
        floor = " / ".join(str(over["median"]) for over in figures["over_floor"].get(name, {}).values())
        lines.append(
            f"| {name} | {statistics.median(values):.0f} | {over['median']} ({over['min']} to {over['max']}) | "
            f"{floor} | {compared_cells} |"
        )
    lines += [
        "",
        "Floor: the multiply-adds that the function needs, at the peak of torch's own products / of oneDNN's packed ones, "
        f"taking turns with the engines: {', '.join(floors)}.",
        "",
        f"The checkpoint that ships, {figures['agreement']['texts']:,} texts, against the card's function:",
        "",
        "| engine | labels that agree | largest difference |",
        "| --- | --- | --- |",
        *(
            f"| {name} | {each['labels_that_agree']:.2%} | {each['largest_difference']:.1e} |"
            for name, each in figures["agreement"]["engines"].items()
        ),
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
