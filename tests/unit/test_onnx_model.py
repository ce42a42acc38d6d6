"""The ONNX graph gives the logits of the Hugging Face network, whatever the architecture, the lengths and their mixture."""

import csv
import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer
from transformers.activations import ACT2FN

from worker.model.checkpoint import BUILTIN
from worker.model.onnx import products
from worker.model.onnx.activations import ACTIVATIONS
from worker.model.onnx.architecture import architecture_of
from worker.model.onnx.graph import build_graph
from worker.model.onnx.session import OnnxModel
from worker.model.onnx.weights import weights_of

SIZES: dict[str, Any] = {
    "vocab_size": 300, "hidden_size": 24, "num_attention_heads": 2, "intermediate_size": 40, "num_labels": 3,
    "num_hidden_layers": 2, "initializer_range": 0.3,
}  # fmt: skip
CARD = {"hidden_size": 312, "num_attention_heads": 12, "intermediate_size": 600, "initializer_range": 0.05}
CONFIGS: dict[str, dict[str, Any]] = {
    "bert": {"model_type": "bert"},
    "bert of the card's architecture": {"model_type": "bert", "num_hidden_layers": 3, **CARD},
    "bert of one layer": {"model_type": "bert", "num_hidden_layers": 1},
    "roberta": {"model_type": "roberta", "max_position_embeddings": 514, "type_vocab_size": 1, "layer_norm_eps": 1e-5},
    "xlm-roberta": {"model_type": "xlm-roberta", "max_position_embeddings": 514, "num_labels": 5},
    "camembert": {"model_type": "camembert", "max_position_embeddings": 520, "pad_token_id": 4},
}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Beside other tests' processes torch's threads wait for each other, a hundred times as long as they compute."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def network_of(model_type: str, **changes: Any) -> Any:
    """A Hugging Face network with random weights, all of them: transformers begins with biases of zero and norms of one."""
    torch.manual_seed(3)
    config = AutoConfig.for_model(model_type, **{**SIZES, **changes})
    network = AutoModelForSequenceClassification.from_config(config).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return network


def onnx_model(network: Any, **wanted: Any) -> OnnxModel:
    """Ours, from what transformers writes: the names of state_dict and the object in config.json."""
    architecture = architecture_of(json.loads(network.config.to_json_string()))
    file = {name: tensor.numpy() for name, tensor in network.state_dict().items()}
    return OnnxModel(build_graph(architecture, weights_of("here", architecture, file), **wanted))


def batch_of(network: Any, lengths: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Random ids of texts of these lengths, padded, and their mask."""
    width = max(lengths)
    ids = torch.randint(5, network.config.vocab_size, (len(lengths), width))
    mask = torch.arange(width) < torch.tensor(lengths)[:, None]
    ids[~mask] = network.config.pad_token_id
    return ids, mask


def difference(network: Any, model: Callable[..., Any], lengths: Sequence[int]) -> float:
    """The largest difference of a logit on random texts of these lengths, as one padded batch."""
    ids, mask = batch_of(network, lengths)
    with torch.inference_mode():
        wanted = network(input_ids=ids, attention_mask=mask.long()).logits.numpy()
    given = model(ids.numpy(), None if mask.all() else np.array(lengths))
    assert given.dtype == np.float32
    return float(np.abs(wanted - given).max())


@pytest.fixture(scope="module", params=CONFIGS)
def pair(request: pytest.FixtureRequest) -> tuple[Any, OnnxModel]:
    network = network_of(**CONFIGS[request.param])
    return network, onnx_model(network)


def test_every_length_alone(pair: tuple[Any, OnnxModel]) -> None:
    lengths = [*range(1, 70), 100, 127, 128, 129, 255, 256, 384, 511, 512]
    assert max(difference(*pair, [length]) for length in lengths) < 1e-5


def test_mixed_lengths(pair: tuple[Any, OnnxModel]) -> None:
    @settings(max_examples=20, deadline=None)
    @given(st.lists(st.integers(1, 90), min_size=1, max_size=9))
    def check(lengths: list[int]) -> None:
        assert difference(*pair, lengths) < 1e-5

    check()
    assert difference(*pair, [512, 3, 200, 511]) < 1e-5


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation(activation: str) -> None:
    network = network_of("bert", hidden_act=activation)
    assert difference(network, onnx_model(network), [40, 33, 2, 1]) < 1e-5


def test_the_activations_that_have_weights_alone_are_left_out() -> None:
    assert set(ACT2FN) - set(ACTIVATIONS) == {"prelu", "xielu"}


@pytest.mark.parametrize("model_type", ["bert", "roberta"])
@pytest.mark.parametrize("epsilon", [0.0, 1e-12, 1e-5, 0.1])
def test_every_epsilon_of_a_layer_norm(model_type: str, epsilon: float) -> None:
    network = network_of(model_type, layer_norm_eps=epsilon)
    assert difference(network, onnx_model(network), [20, 5]) < 1e-5


@settings(max_examples=15, deadline=None)
@given(
    st.sampled_from(["bert", "roberta", "xlm-roberta", "camembert"]),
    st.integers(1, 4), st.integers(1, 9), st.integers(1, 50), st.integers(1, 3), st.integers(1, 6), st.integers(1, 3),
)  # fmt: skip
def test_every_size(
    model_type: str, heads: int, head_size: int, intermediate: int, layers: int, labels: int, token_types: int
) -> None:
    network = network_of(
        model_type, num_attention_heads=heads, hidden_size=heads * head_size, intermediate_size=intermediate,
        num_hidden_layers=layers, num_labels=labels, type_vocab_size=token_types, max_position_embeddings=60,
    )  # fmt: skip
    assert difference(network, onnx_model(network), [50, 7, 1]) < 1e-5


def test_a_text_with_no_number_keeps_it_to_itself() -> None:
    network = network_of("bert")
    with torch.no_grad():
        network.bert.embeddings.word_embeddings.weight[7] = torch.nan
    ids = np.array([[9, 7, 9], [9, 9, 0], [9, 9, 9]])
    finite = np.isfinite(onnx_model(network)(ids, np.array([3, 2, 3]))).all(-1)
    assert finite.tolist() == [False, True, True]


def test_several_threads_may_call_at_once() -> None:
    model = onnx_model(network_of("bert"))
    batches = [np.random.default_rng(seed).integers(5, 300, (3, 40)) for seed in range(40)]
    alone = [model(ids, None) for ids in batches]
    with ThreadPoolExecutor(4) as pool:
        np.testing.assert_array_equal(list(pool.map(lambda ids: model(ids, None), batches)), alone)


def test_the_weights_need_not_be_kept() -> None:
    network = network_of("bert")
    model = onnx_model(network)
    before = difference(network, model, [9, 3])
    wanted = model(np.full((2, 9), 7), None)
    weights = {name: tensor.numpy().copy() for name, tensor in network.state_dict().items()}
    graph = build_graph(architecture_of(network.config.to_dict()), weights)
    other = OnnxModel(graph)
    for values in weights.values():
        values.fill(7)
    np.testing.assert_array_equal(other(np.full((2, 9), 7), None), wanted)
    assert before < 1e-5


@pytest.fixture(scope="module")
def reviews() -> list[list[int]]:
    tokenizer = AutoTokenizer.from_pretrained(BUILTIN)
    with (BUILTIN / "demo.csv").open(encoding="utf-8", newline="") as file:
        texts = [row["text"] for row in csv.DictReader(file)]
    ids: list[list[int]] = tokenizer(texts, truncation=True, max_length=128)["input_ids"]
    return ids


@pytest.mark.parametrize("has_reduced_range", [True, False])
def test_int8_agrees_on_real_texts(
    monkeypatch: pytest.MonkeyPatch, reviews: list[list[int]], has_reduced_range: bool
) -> None:
    """On the reviews that ship with the package; benchmarks/onnx_engine.py measures it on many more."""
    monkeypatch.setattr(products, "needs_reduced_range", lambda: has_reduced_range)
    network = AutoModelForSequenceClassification.from_pretrained(BUILTIN, dtype=torch.float32).eval()
    exact, int8 = onnx_model(network), onnx_model(network, is_int8=True)
    logits = [(exact(np.array([ids]), None)[0], int8(np.array([ids]), None)[0]) for ids in reviews]
    agreeing = sum(one.argmax() == other.argmax() for one, other in logits)
    assert agreeing >= 0.99 * len(reviews)
    assert 1e-4 < max(np.abs(one - other).max() for one, other in logits) < 1.0


def test_neither_torch_nor_transformers_nor_onnx_is_imported() -> None:
    code = (
        "import sys, worker.model.onnx.session, worker.model.onnx.weights, worker.model.onnx.graph\n"
        "print(sorted({'torch', 'transformers', 'onnx', 'onnxscript'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
