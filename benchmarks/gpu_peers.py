"""Other ways to run the same model on the same device: the part `peers` of benchmarks/gpu.py."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

BY_HAND = 512  # texts of a batch
CARD_TEXTS = 256
PIPELINE_TEXTS = 4_096
SORTED_TEXTS = 8_192


def peers(checkpoint: Path, device: str, dtype: str, texts: Sequence[str], share: float = 1.0) -> dict[str, Any]:
    """Texts per second of each, from text. `share` of the usual number of texts is taken; the first run warms up."""
    half = getattr(torch, dtype)
    ways: dict[str, tuple[Callable[[Sequence[str]], object], int]] = {
        "the card's loop, float32": (card_loop(checkpoint, device), CARD_TEXTS),
        f"transformers' pipeline, {dtype}, 32 a batch": (hugging_face(checkpoint, device, half, 32), PIPELINE_TEXTS),
        f"transformers' pipeline, {dtype}, 256 a batch": (hugging_face(checkpoint, device, half, 256), PIPELINE_TEXTS),
        f"transformers by hand, sorted, {dtype}, {BY_HAND} a batch": (by_hand(checkpoint, device, half), SORTED_TEXTS),
    }
    found = {}
    for name, (way, count) in ways.items():
        some = texts[: max(1, int(count * share))]
        way(some[: max(1, len(some) // 8)])
        began = time.perf_counter()
        way(some)
        found[name] = round(len(some) / (time.perf_counter() - began), 1)
    return {"texts_per_s": found}


def card_loop(checkpoint: Path, device: str) -> Callable[[Sequence[str]], object]:
    """The function on the model's card, one text after another."""
    tokenizer, model = loaded(checkpoint, device, torch.float32)

    def score(texts: Sequence[str]) -> list[Any]:
        answers = []
        with torch.no_grad():
            for text in texts:
                inputs = tokenizer(text, return_tensors="pt", truncation=True, padding=True).to(model.device)
                answers.append(torch.sigmoid(model(**inputs).logits).cpu().numpy()[0])
        return answers

    return score


def hugging_face(checkpoint: Path, device: str, dtype: torch.dtype, batch: int) -> Callable[[Sequence[str]], object]:
    """The Hugging Face pipeline, texts in the order of their arrival."""
    scorer = pipeline("text-classification", model=str(checkpoint), device=device, dtype=dtype)

    def score(texts: Sequence[str]) -> list[Any]:
        answers: list[Any] = scorer(list(texts), batch_size=batch, top_k=None, truncation=True)
        return answers

    return score


def by_hand(checkpoint: Path, device: str, dtype: torch.dtype) -> Callable[[Sequence[str]], object]:
    """What one would write: all texts tokenized and sorted by their length, then padded batch after batch."""
    tokenizer, model = loaded(checkpoint, device, dtype)

    def score(texts: Sequence[str]) -> list[Any]:
        ids = sorted(tokenizer(list(texts), truncation=True, max_length=512)["input_ids"], key=len)
        with torch.inference_mode():
            return [
                torch.sigmoid(model(**padded(tokenizer, ids[begin : begin + BY_HAND], model.device)).logits).cpu()
                for begin in range(0, len(ids), BY_HAND)
            ]

    return score


def padded(tokenizer: Any, ids: list[list[int]], device: torch.device) -> Any:
    return tokenizer.pad({"input_ids": ids}, return_tensors="pt").to(device)


def loaded(checkpoint: Path, device: str, dtype: torch.dtype) -> tuple[Any, Any]:
    model = AutoModelForSequenceClassification.from_pretrained(checkpoint, dtype=dtype).to(device).eval()
    return AutoTokenizer.from_pretrained(checkpoint), model
