"""The ONNX graph gives the logits of the Hugging Face network, whatever the architecture, the lengths and their mixture."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from tests.unit.test_bert import NETWORKS, longest
from worker.model.onnx.architecture import architecture_of
from worker.model.onnx.graph import build_graph
from worker.model.onnx.session import OnnxModel


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Beside other tests' processes torch's threads wait for each other, a hundred times as long as they compute."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", params=NETWORKS)
def network(request: pytest.FixtureRequest) -> Any:
    torch.manual_seed(3)
    return NETWORKS[request.param]()


def onnx_model(network: Any) -> OnnxModel:
    weights = {name: tensor.numpy() for name, tensor in network.state_dict().items()}
    return OnnxModel(build_graph(architecture_of(network.config.to_dict()), weights))


def difference(network: Any, model: Callable[..., Any], lengths: Sequence[int]) -> float:
    """The largest difference of a logit on random texts of these lengths, as one padded batch."""
    width = max(lengths)
    ids = torch.randint(5, network.config.vocab_size, (len(lengths), width))
    mask = torch.arange(width) < torch.tensor(lengths)[:, None]
    ids[~mask] = network.config.pad_token_id
    with torch.inference_mode():
        wanted = network(input_ids=ids, attention_mask=mask.long()).logits.numpy()
    given = model(ids.numpy(), None if min(lengths) == width else np.array(lengths))
    return float(np.abs(wanted - given).max())


def test_lengths_alone(network: Any) -> None:
    model = onnx_model(network)
    lengths = [*range(1, 40), 64, 100, 255, 256, longest(network)]
    assert max(difference(network, model, [length]) for length in lengths) < 1e-5


def test_mixed_lengths(network: Any) -> None:
    model = onnx_model(network)
    draw = np.random.default_rng(5)
    for bound in (2, 9, 60, 200, longest(network)):
        assert difference(network, model, draw.integers(1, bound + 1, 9).tolist()) < 1e-5
