"""Weights are read equal to what torch reads, from whichever file, into memory that no file can change."""

import json
import os
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from tests.unit.test_checkpoint_attacks import REFUSED
from worker.model import torch_archive, weights
from worker.model.checkpoint import Checkpoint, ModelError, NeedsTorch, find_in
from worker.model.weights import read_weights

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
OTHERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)
Weights = dict[str, torch.Tensor]


def save_safetensors(tensors: Weights, file: Path) -> None:
    save_file({name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}, file)


SAVE: dict[str, Callable[[Weights, Path], object]] = {
    "model.safetensors": save_safetensors,
    "pytorch_model.bin": torch.save,
}
each_format = pytest.mark.parametrize("file", SAVE)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    return tmp_path


def read(folder: Path, wanted: set[str] | None = None) -> dict[str, Any]:
    return read_weights(Checkpoint(str(folder), find_in(folder)), wanted)


def assert_equal(found: dict[str, Any], tensors: Weights) -> None:
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        wanted = (tensor.detach().float() if tensor.is_floating_point() else tensor).numpy()
        assert found[name].dtype == wanted.dtype, name
        assert found[name].shape == wanted.shape, name
        assert found[name].flags.c_contiguous, name
        np.testing.assert_array_equal(found[name], wanted, err_msg=name)


@each_format
def test_every_type_and_shape_is_read_as_torch_reads_it(folder: Path, file: str) -> None:
    numbers = torch.tensor([[1.5, -2.25, 0.1], [float("inf"), float("nan"), 7e4]])
    tensors = {str(dtype): numbers.to(dtype) for dtype in FLOATS}
    tensors |= {str(dtype): torch.tensor([[0, 1], [3, 100]]).to(dtype) for dtype in OTHERS}
    tensors |= {
        "of no axis": torch.tensor(2.5),
        "empty": torch.zeros(0, 3),
        "too large": torch.tensor([1e300]).double(),
    }
    tensors |= {"transposed": torch.randn(3, 5).T, "part": torch.randn(10)[2:7], "column": torch.randn(4, 4)[:, 1]}
    tensors |= {"parameter": torch.nn.Parameter(torch.randn(2)), "positions": torch.arange(512).expand((1, -1))}
    SAVE[file](tensors, folder / file)
    assert_equal(read(folder), tensors)


def test_a_state_dict_with_its_metadata_is_read(folder: Path) -> None:
    module = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.LayerNorm(2))
    state = module.state_dict()
    assert hasattr(state, "_metadata")
    torch.save(state, folder / "pytorch_model.bin")
    assert_equal(read(folder), dict(state))
    torch.save(OrderedDict(module.named_parameters()), folder / "pytorch_model.bin")
    assert_equal(read(folder), dict(state))


def test_tied_weights_share_memory(folder: Path) -> None:
    weight = torch.randn(4, 3)
    torch.save({"embeddings": weight, "decoder": weight, "turned": weight.T}, folder / "pytorch_model.bin")
    found = read(folder)
    assert np.shares_memory(found["embeddings"], found["decoder"])
    assert_equal(found, {"embeddings": weight, "decoder": weight, "turned": weight.T})


def test_entries_that_are_no_tensors_are_left_out(folder: Path) -> None:
    torch.save({"a": torch.ones(2), "epoch": 3, "name": "x", "loss": 0.5, "none": None}, folder / "pytorch_model.bin")
    assert read(folder).keys() == {"a"}


views = st.tuples(  # type, shape, whether it is transposed, whether its first row is cut off
    st.sampled_from([*FLOATS, *OTHERS]), st.lists(st.integers(0, 4), max_size=4), st.booleans(), st.booleans()
)


@given(drawn=st.dictionaries(st.text(st.characters(codec="utf-8"), max_size=5), views, max_size=4))
def test_every_state_dict_is_read_equal(tmp_path_factory: pytest.TempPathFactory, drawn: dict[str, Any]) -> None:
    tensors = {}
    for name, (dtype, shape, turn, part) in drawn.items():
        tensor = torch.randint(0, 100, shape).to(dtype)
        tensor = tensor.permute(tuple(reversed(range(len(shape))))) if turn else tensor
        tensors[name] = tensor[1:] if part and tensor.dim() and len(tensor) > 1 else tensor
    folder = tmp_path_factory.mktemp("model")
    (folder / "config.json").write_text('{"model_type": "bert"}')
    torch.save(tensors, folder / "pytorch_model.bin")
    assert_equal(read(folder), tensors)


@each_format
def test_only_wanted_weights_are_read(folder: Path, file: str) -> None:
    tensors = {name: torch.randn(2, 2) for name in "abc"}
    SAVE[file](tensors, folder / file)
    assert_equal(read(folder, {"b", "nothing"}), {"b": tensors["b"]})


@each_format
def test_shards_are_read_by_their_index(folder: Path, file: str) -> None:
    tensors = {name: torch.randn(2, 2) for name in "abc"}
    kind = Path(file).suffix
    SAVE[file]({"a": tensors["a"], "b": tensors["b"]}, folder / f"one{kind}")
    SAVE[file]({"c": tensors["c"]}, folder / f"two{kind}")
    weight_map = {"a": f"one{kind}", "b": f"one{kind}", "c": f"two{kind}"}
    (folder / f"{file}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    assert_equal(read(folder), tensors)


@each_format
def test_a_file_that_is_overwritten_changes_nothing(folder: Path, file: str) -> None:
    tensors = {"a": torch.randn(300, 300), "b": torch.randn(300, 300).T}
    SAVE[file](tensors, folder / file)
    found = read(folder)
    with (folder / file).open("r+b") as opened:
        opened.write(b"\xff" * opened.seek(0, os.SEEK_END))
        opened.truncate(0)
    assert_equal(found, tensors)


@each_format
def test_a_file_that_is_cut_while_it_is_read_is_refused(
    folder: Path, file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    SAVE[file]({"a": torch.randn(300, 300)}, folder / file)
    original = weights.read_array

    def cut(*arguments: Any) -> Any:
        os.truncate(folder / file, 20_000)
        return original(*arguments)

    monkeypatch.setattr(weights, "read_array", cut)
    monkeypatch.setattr(torch_archive, "read_array", cut)
    with pytest.raises(ModelError, match=f"its {file} is damaged .it became shorter while it was read"):
        read(folder)


@each_format
def test_a_file_that_was_cut_short_is_said_to_be(folder: Path, file: str) -> None:
    SAVE[file]({"a": torch.randn(30, 30)}, folder / file)
    whole = (folder / file).read_bytes()
    for length in (0, 4, 100, len(whole) // 2, len(whole) - 1):
        (folder / file).write_bytes(whole[:length])
        with pytest.raises(
            ModelError, match=r"is damaged \(.*\); if it was cut short, copy or download it again"
        ) as refusal:
            read(folder)
        assert str(refusal.value).startswith(f"model {folder} cannot be loaded: its {file} ")


def test_what_only_torch_reads_says_which_extra_it_needs(folder: Path) -> None:
    tensors = {"a": torch.zeros(4).to(torch.float8_e4m3fn)}
    torch.save({"a": torch.zeros(3)}, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    with pytest.raises(NeedsTorch, match=r"format of torch before 1\.6.*pip install 'sentiment-worker\[torch\]'"):
        read(folder)
    torch.save(tensors, folder / "pytorch_model.bin")
    with pytest.raises(NeedsTorch, match="_rebuild_tensor_v3"):
        read(folder)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(NeedsTorch, match="F8_E4M3"):
        read(folder)


def test_a_bin_is_warned_of(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    torch.save({"a": torch.zeros(3)}, folder / "pytorch_model.bin")
    read(folder)
    assert "comes as a .bin without safetensors" in caplog.text
    caplog.clear()
    save_file({"a": torch.zeros(3)}, folder / "model.safetensors")
    read(folder)
    assert caplog.text == ""


def test_neither_torch_nor_transformers_is_imported(folder: Path) -> None:
    torch.save({"a": torch.zeros(3).bfloat16()}, folder / "pytorch_model.bin")
    code = (
        "import sys; from pathlib import Path; from worker.model.checkpoint import Checkpoint, find_in; "
        "from worker.model.weights import read_weights; "
        "print(read_weights(Checkpoint('x', find_in(Path(sys.argv[1])))), {'torch', 'transformers'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code, folder], capture_output=True, text=True, check=True)
    assert done.stdout == "{'a': array([0., 0., 0.], dtype=float32)} set()\n"


OF_WEIGHTS = [
    name for name in REFUSED if any(word in name for word in ("pickle", "weights", "header", "a tensor", "file"))
]


@pytest.mark.parametrize("name", OF_WEIGHTS)
def test_attacks_on_checkpoints_are_refused_here_too(checkpoint: Path, folder: Path, name: str) -> None:
    trace = folder / "it-ran"
    (folder / "model.safetensors").write_bytes((checkpoint / "model.safetensors").read_bytes())
    REFUSED[name](folder, trace)
    with pytest.raises(ModelError) as refusal:
        read(folder)
    assert not trace.exists()
    assert str(folder) in str(refusal.value)
    assert "\n" not in str(refusal.value)
    assert len(str(refusal.value)) < 600
