"""The engine without Kafka: `python -m benchmarks.engine TEXTS.csv` writes benchmarks/results/engine.{json,md}.

With a randomly initialised network of the card's architecture, taking turns in every round:

- card loop: the card's own function, one text after another;
- pipeline: the Hugging Face pipeline with batch_size 32, texts in order of arrival;
- ours, for each backend and number type: micro-batches of 512 texts, tokenized, sorted and scored;
- the floor: the multiply-adds that the function needs, at the rate of torch's products of matrices in the same run.

And what int8 and bfloat16 change: labels that agree with float32's, and the largest difference of a probability.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoConfig, AutoTokenizer, pipeline

from benchmarks.common import WINDOW, machine, make_checkpoint, ratio, read_texts, write
from benchmarks.worker import TORCH_THREADS, CardLoop
from worker.exported import is_installed
from worker.model import SentimentModel
from worker.network import PackedLinear, PlainLinear, seconds

Speed = Callable[[Sequence[str]], float]


def main() -> None:
    options = parsed_options()
    texts = read_texts(options.texts)
    with tempfile.TemporaryDirectory() as name:
        os.environ["XDG_CACHE_HOME"] = name
        figures = measured(make_checkpoint(Path(name) / "card"), texts, options.rounds)
    figures["agreement"] = {kind: agreement("builtin", kind, texts) for kind in number_types()}
    write("engine", figures, table(figures))


def parsed_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", type=Path, help="CSV file with a column text")
    parser.add_argument("--rounds", type=int, default=5, help="times that all take turns (default: 5)")
    return parser.parse_args()


def number_types() -> list[str]:
    return ["bfloat16", *(["int8"] if is_installed() else [])]


def engines() -> dict[str, dict[str, str]]:
    """What to load for each of ours."""
    wanted = {"torch float32": {"backend": "torch"}, "torch bfloat16": {"backend": "torch", "dtype": "bfloat16"}}
    if is_installed():
        wanted |= {"onnx float32": {"backend": "onnx"}, "onnx int8": {"dtype": "int8"}}
    return wanted


def measured(checkpoint: Path, texts: Sequence[str], rounds: int) -> dict[str, Any]:
    """Texts per second of each by round, their ratios to the card's loop, and the floor."""
    card, hugging_face = CardLoop(checkpoint), HuggingFacePipeline(checkpoint)
    ours = {name: SentimentModel.load(str(checkpoint), device="cpu", **wanted) for name, wanted in engines().items()}
    ways: dict[str, tuple[Speed, int]] = {"card loop": (card.speed, 256), "pipeline": (hugging_face.speed, 256)}
    ways |= {name: (speed_of(model), 2_048) for name, model in ours.items()}
    speeds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(rounds + 1):  # the first warms up
        for name, (speed, count) in ways.items():
            begin = turn * count % (len(texts) - count)
            taken = speed(texts[begin : begin + count])
            if turn:
                speeds[name].append(taken)
        print({name: round(values[-1]) for name, values in speeds.items() if values}, flush=True)
    sample = texts[:400]
    wanted = card.probabilities(sample)
    torch.set_num_threads(TORCH_THREADS)
    peaks = peak_flops()
    flops = flops_per_text(checkpoint, texts[: 4 * WINDOW])
    floors = {name: peak / flops for name, peak in peaks.items()}
    return {
        "machine": machine(None),
        "threads": next(iter(ours.values())).passes,
        "texts_per_s": {name: [round(value, 1) for value in values] for name, values in speeds.items()},
        "over_card_loop": {name: ratio(values, speeds["card loop"]) for name, values in speeds.items()},
        "budgets": {name: model.max_batch_tokens for name, model in ours.items()},
        "peak_gflops": {name: round(peak / 1e9, 1) for name, peak in peaks.items()},
        "floor_texts_per_s": {name: round(floor, 1) for name, floor in floors.items()},
        "over_floor": {
            name: {by: round(statistics.median(speeds[name]) / floor, 3) for by, floor in floors.items()}
            for name in ours
        },
        "difference": {name: compared(wanted, model.get_sentiment(sample, "proba")) for name, model in ours.items()},
    }


class HuggingFacePipeline:
    def __init__(self, checkpoint: Path) -> None:
        self._pipeline = pipeline(
            "text-classification", model=str(checkpoint), device="cpu", function_to_apply="sigmoid"
        )

    def speed(self, texts: Sequence[str]) -> float:
        torch.set_num_threads(TORCH_THREADS)
        started = time.perf_counter()
        for _ in self._pipeline(list(texts), batch_size=32, top_k=None, truncation=True, max_length=512):
            pass
        return len(texts) / (time.perf_counter() - started)


def speed_of(model: SentimentModel) -> Speed:
    def speed(texts: Sequence[str]) -> float:
        started = time.perf_counter()
        for begin in range(0, len(texts), WINDOW):
            model.score(texts[begin : begin + WINDOW])
        return len(texts) / (time.perf_counter() - started)

    return speed


def compared(wanted: NDArray[np.float64], given: NDArray[np.float64]) -> dict[str, float]:
    return {
        "labels_that_agree": round(float((wanted.argmax(1) == given.argmax(1)).mean()), 4),
        "largest_difference": float(np.abs(wanted - given).max()),
    }


def agreement(model: str, dtype: str, texts: Sequence[str]) -> dict[str, float]:
    """On all texts, with a trained checkpoint."""
    exact = SentimentModel.load(model, device="cpu", backend="torch")
    other = SentimentModel.load(model, device="cpu", dtype=dtype)
    return {"texts": len(texts), **compared(exact.get_sentiment(texts, "proba"), other.get_sentiment(texts, "proba"))}


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


def peak_flops() -> dict[str, float]:
    """Operations per second of float32 products: the best of torch's own, and the best with oneDNN's packed weights."""
    squares = {size: torch.randn(size, size) for size in (1_024, 2_048)}
    plain = [2 * size**3 / seconds(torch.mm, matrix, matrix) for size, matrix in squares.items()]
    weight, bias, rows = torch.randn(936, 312), torch.randn(936), torch.randn(4_096, 312)
    flops = 2 * 4_096 * 312 * 936
    with torch.inference_mode():
        plain.append(flops / seconds(PlainLinear(weight, bias, False), rows))
        packed = flops / seconds(PackedLinear(weight, bias, False), rows)
    return {"torch": max(plain), "oneDNN": packed}


def table(figures: dict[str, Any]) -> str:
    floors = [
        f"{name} {figures['peak_gflops'][name]:.0f} GFLOP/s, {floor:.0f} texts/s"
        for name, floor in figures["floor_texts_per_s"].items()
    ]
    lines = [
        f"Machine: {figures['machine']['cpu']}, {figures['machine']['cores']} cores; {figures['threads']} threads. Random "
        "network of the card's architecture, unique texts, medians of "
        f"{len(figures['texts_per_s']['card loop'])} rounds in turn (least to most).",
        "",
        "| engine | texts/s | over the card's loop | over the floor | labels that agree | largest difference |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, values in figures["texts_per_s"].items():
        over = figures["over_card_loop"][name]
        difference = figures["difference"].get(name, {})
        floor = " / ".join(map(str, figures["over_floor"].get(name, {}).values()))
        lines.append(
            f"| {name} | {statistics.median(values):.0f} | {over['median']} ({over['min']} to {over['max']}) | "
            f"{floor} | {difference.get('labels_that_agree', '')} | "
            f"{difference.get('largest_difference', '')} |"
        )
    lines += [
        "",
        "Floor: the multiply-adds that the function needs, at the peak of torch's own products / of oneDNN's packed ones, "
        f"in the same run: {', '.join(floors)}.",
        "",
        "| number type, builtin checkpoint | texts | labels that agree with float32 | largest difference |",
        "| --- | --- | --- | --- |",
        *(
            f"| {kind} | {each['texts']} | {each['labels_that_agree']:.2%} | {each['largest_difference']:.4f} |"
            for kind, each in figures["agreement"].items()
        ),
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
