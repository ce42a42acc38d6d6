"""What the benchmarks share: texts, a checkpoint, events, ratios, the machine, and where results go."""

import csv
import hashlib
import json
import os
import platform
import random
import shutil
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from tests.support.broker import Broker
from tests.support.checkpoint import TOKENIZER
from tests.support.topics import Record

RESULTS = Path(__file__).parent / "results"
WORKER = Path(__file__).parent.parent / "worker"
WINDOW = 512


class Process(Protocol):
    """What runs in a benchmark: the worker or a peer."""

    @property
    def pid(self) -> int: ...
    @property
    def is_running(self) -> bool: ...
    @property
    def output(self) -> str: ...
    def terminate(self) -> int: ...


def read_texts(path: Path) -> list[str]:
    """Unique texts, shuffled with a fixed seed."""
    with path.open(encoding="utf-8", newline="") as file:
        texts = sorted({row["text"] for row in csv.DictReader(file) if row["text"].strip()})
    random.Random(0).shuffle(texts)
    return texts


def make_checkpoint(folder: Path) -> Path:
    """The card's architecture with random weights. Imports torch, which takes seconds and which other benchmarks lack."""
    import torch
    from transformers import BertConfig, BertForSequenceClassification

    shutil.copytree(TOKENIZER, folder)
    torch.manual_seed(0)
    BertForSequenceClassification(BertConfig.from_pretrained(TOKENIZER)).save_pretrained(folder)
    return folder


def ratio(some: Sequence[float], others: Sequence[float]) -> dict[str, float]:
    ratios = sorted(one / other for one, other in zip(some, others, strict=True))
    return {"median": round(statistics.median(ratios), 3), "min": round(ratios[0], 3), "max": round(ratios[-1], 3)}


def event(number: int, text: str) -> Record:
    return Record(key=str(number).encode(), value=json.dumps({"id": number, "text": text}).encode())


def alive(process: Process) -> bool:
    assert process.is_running, process.output[-2000:]
    return True


def machine(broker: Broker | None) -> dict[str, Any]:
    model = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text().splitlines()
        model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), model)
        flags = next((line for line in lines if line.startswith("flags")), "").split()
        model += ", " + "/".join(flag for flag in ("avx2", "avx512f", "avx512_vnni", "avx512_bf16") if flag in flags)
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "broker": broker.kind if broker else None,
    }


def code() -> str:
    """A digest of the worker's own code: figures of the same one belong together."""
    digest = hashlib.sha256()
    for path in sorted(WORKER.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def write(name: str, figures: dict[str, Any], table: str, *, is_shown: bool = True) -> None:
    """Puts figures and their table into `results/`, and prints the table."""
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(figures, indent=2) + "\n")
    (RESULTS / f"{name}.md").write_text(table)
    if is_shown:
        print(table)
