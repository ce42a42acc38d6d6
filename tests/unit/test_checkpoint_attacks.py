"""Checkpoints made by someone who means harm: refused with a sentence, and nothing of theirs is ever run."""

import json
import os
import pickle
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.process import forked
from worker.model.checkpoint import ModelError
from worker.model.sentiment_model import SentimentModel

Attack = Callable[[Path, Path], None]  # on a copy of a good checkpoint, with the file that must never be written


class Payload:
    """Touches a file when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self._trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self._trace,)


def edit(file: Path, **entries: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | entries))


def code(folder: Path, trace: Path) -> None:
    """Python that touches the file when it is imported."""
    for name in ("code", "modeling_evil", "tokenization_evil", "__init__"):
        (folder / f"{name}.py").write_text(f"import pathlib\npathlib.Path({str(trace)!r}).touch()\n")


def only_bin(folder: Path, content: bytes) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(content)


def plain_pickle(folder: Path, trace: Path) -> None:
    only_bin(folder, pickle.dumps({"classifier.weight": Payload(trace)}))


def torch_pickle(folder: Path, trace: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({"classifier.weight": Payload(trace)}, folder / "pytorch_model.bin")


def old_torch_pickle(folder: Path, trace: Path) -> None:
    (folder / "model.safetensors").unlink()
    content = {"classifier.weight": Payload(trace)}
    torch.save(content, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)


def sharded_pickle(folder: Path, trace: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({"classifier.weight": Payload(trace)}, folder / "part.bin")
    index = {"metadata": {}, "weight_map": {"classifier.weight": "part.bin"}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


def pickle_named_safetensors(folder: Path, trace: Path) -> None:
    (folder / "model.safetensors").write_bytes(pickle.dumps(Payload(trace)))


def own_architecture(folder: Path, trace: Path) -> None:
    code(folder, trace)
    classes = {"AutoConfig": "code.Config", "AutoModelForSequenceClassification": "modeling_evil.Model"}
    edit(folder / "config.json", model_type="surprise", auto_map=classes)


def own_tokenizer_alone(folder: Path, trace: Path) -> None:
    code(folder, trace)
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.txt").unlink()
    classes = {"AutoTokenizer": ["tokenization_evil.Evil", None]}
    edit(folder / "tokenizer_config.json", tokenizer_class="Evil", auto_map=classes)


def weights_elsewhere(folder: Path, _: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to("/etc/passwd")


def weights_nowhere(folder: Path, _: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to("nowhere")


def weights_that_never_come(folder: Path, _: Path) -> None:
    (folder / "model.safetensors").unlink()
    os.mkfifo(folder / "model.safetensors")


def header(length: int, text: bytes) -> Attack:
    def write(folder: Path, _: Path) -> None:
        (folder / "model.safetensors").write_bytes(struct.pack("<Q", length) + text)

    return write


def tensor(**changes: Any) -> Attack:
    """The header of one tensor, changed."""
    entry = {"dtype": "F32", "shape": [3], "data_offsets": [0, 12], **changes}
    text = json.dumps({"classifier.bias": entry}).encode()
    return header(len(text), text + bytes(12))


def truncated(folder: Path, _: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def config(**entries: Any) -> Attack:
    return lambda folder, _: edit(folder / "config.json", **entries)


def raw(name: str, content: bytes) -> Attack:
    def write(folder: Path, _: Path) -> None:
        (folder / name).write_bytes(content)

    return write


def more_tokens_than_rows(folder: Path, _: Path) -> None:
    """On a GPU a token beyond the network's end would take the device away from every text."""
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["запредельно"] = 10**6
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))


REFUSED: dict[str, Attack] = {
    "a pickle": plain_pickle,
    "torch's pickle": torch_pickle,
    "torch's old pickle": old_torch_pickle,
    "a pickle in shards": sharded_pickle,
    "a pickle by another name": pickle_named_safetensors,
    "an architecture of its own": own_architecture,
    "a tokenizer of its own": own_tokenizer_alone,
    "weights that are another file": weights_elsewhere,
    "weights that are nowhere": weights_nowhere,
    "weights that never come": weights_that_never_come,
    "an endless header": header(2**63, b"{}"),
    "a header past the end": header(1_000, b"{}"),
    "a header that is no JSON": header(4, b"\xff\xfe{}"),
    "a deep header": header(200_000, b"[" * 200_000),
    "an empty file": raw("model.safetensors", b""),
    "weights cut short": truncated,
    "a tensor past the end": tensor(data_offsets=[0, 2**40]),
    "a tensor that begins behind its end": tensor(data_offsets=[12, 0]),
    "a tensor larger than its bytes": tensor(shape=[2**40]),
    "a tensor whose size overflows": tensor(shape=[2**33, 2**33]),
    "a tensor of no type": tensor(dtype="EVIL"),
    "a huge network": config(hidden_size=2**31, intermediate_size=2**31, num_attention_heads=1),
    "labels out of range": config(id2label={"0": "negative", "1": "neutral", "7": "positive"}),
    "labels below zero": config(id2label={"-1": "negative", "0": "neutral", "1": "positive"}),
    "a config that is no JSON": raw("config.json", b"\x80\x04"),
    "a deep config": raw("config.json", b"[" * 200_000),
    "a tokenizer that is no JSON": raw("tokenizer.json", b"\x80\x04"),
    "more tokens than rows": more_tokens_than_rows,
}


def code_beside(folder: Path, trace: Path) -> None:
    """It names classes that the library has too: those are taken."""
    code(folder, trace)
    classes = {"AutoConfig": "code.Config", "AutoModelForSequenceClassification": "modeling_evil.Model"}
    edit(folder / "config.json", auto_map=classes)
    edit(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["tokenization_evil.Evil", None]})


def pickles_beside(folder: Path, trace: Path) -> None:
    for name in (
        "pytorch_model.bin",
        "tokenizer.pkl",
        "vocab.pkl",
        "training_args.bin",
        "optimizer.pt",
        "rust_model.ot",
    ):
        (folder / name).write_bytes(pickle.dumps(Payload(trace)))


UNTOUCHED: dict[str, Attack] = {
    "code beside": code_beside,
    "pickles beside": pickles_beside,
    "attention of the hub": config(_attn_implementation="kernels-community/evil@main"),
    "attention of the hub by its other name": config(attn_implementation="kernels-community/evil@main"),
}


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    return tmp_path / "it-ran"


def attacked(checkpoint: Path, folder: Path, attack: Attack, trace: Path) -> Path:
    shutil.copytree(checkpoint, folder)
    attack(folder, trace)
    return folder


@pytest.mark.parametrize("name", REFUSED)
def test_a_checkpoint_that_means_harm_is_refused(checkpoint: Path, tmp_path: Path, trace: Path, name: str) -> None:
    folder = attacked(checkpoint, tmp_path / "evil", REFUSED[name], trace)
    with pytest.raises(ModelError) as refusal:
        SentimentModel.load(str(folder), backend="torch", cpu_threads=1, max_batch_tokens=512)
    assert not trace.exists()
    sentence = str(refusal.value)
    assert str(folder) in sentence or "this checkpoint" in sentence
    assert "\n" not in sentence
    assert len(sentence) < 600


@pytest.mark.parametrize("name", UNTOUCHED)
def test_what_lies_beside_a_checkpoint_is_not_run(checkpoint: Path, tmp_path: Path, trace: Path, name: str) -> None:
    folder = attacked(checkpoint, tmp_path / "evil", UNTOUCHED[name], trace)
    model = SentimentModel.load(str(folder), backend="torch", cpu_threads=1, max_batch_tokens=512)
    assert model.get_sentiment("да") in ("negative", "neutral", "positive")
    assert not trace.exists()


@pytest.mark.parametrize("name", ["torch's pickle", "an architecture of its own", "an endless header"])
def test_a_command_with_such_a_checkpoint_ends_with_a_sentence(
    checkpoint: Path, tmp_path: Path, trace: Path, name: str
) -> None:
    folder = attacked(checkpoint, tmp_path / "evil", REFUSED[name], trace)
    done = forked("classify", "--model", folder, "--log-format", "console", "да", folder=folder)
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"sentiment-worker: model {folder} cannot be loaded: ")
    assert not trace.exists()
