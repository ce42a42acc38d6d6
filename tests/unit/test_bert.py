"""BertClassifier gives the logits of the checkpoint's own model, whatever the checkpoint, the lengths and their mixture."""

import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AlbertConfig, AlbertForSequenceClassification, AutoModelForSequenceClassification

from tests.support.classifiers import SIZES, bert, of_the_card, xlm_roberta
from worker.model.checkpoint import BUILTIN
from worker.model.runner import PaddedPasses
from worker.model.sentiment_model import SentimentModel
from worker.model.torch import bert as bert_module
from worker.model.torch.backends import NumpyForward, choose_forward
from worker.model.torch.bert import (
    TEXT_BY_TEXT,
    TOKEN_BY_TOKEN,
    BertClassifier,
    Forward,
    PackedLinear,
    PlainLinear,
    is_alike,
    is_covered,
)

NETWORKS: dict[str, Callable[[], Any]] = {
    "three layers": bert,
    "one layer": lambda: bert(num_hidden_layers=1),
    "another activation": lambda: bert(hidden_act="gelu_new"),
    "relu": lambda: bert(hidden_act="relu"),
    "the card's architecture": of_the_card,
    "xlm-roberta": xlm_roberta,
    "builtin": lambda: AutoModelForSequenceClassification.from_pretrained(BUILTIN, dtype=torch.float32).eval(),
}


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


def differences(network: Any, forward: Forward, lengths: Sequence[int]) -> float:
    """The largest difference of a logit on random texts of these lengths, as one padded batch."""
    width = max(lengths)
    ids = torch.randint(5, network.config.vocab_size, (len(lengths), width))
    mask = torch.arange(width) < torch.tensor(lengths)[:, None]
    ids[~mask] = network.config.pad_token_id
    with torch.inference_mode():
        wanted = network(input_ids=ids, attention_mask=mask.long()).logits
        given = forward(ids, None if min(lengths) == width else torch.tensor(lengths))
    return float((wanted - given).abs().max())


def longest(network: Any) -> int:
    return min(512, network.config.max_position_embeddings)


EVERY_LENGTH = ("three layers", "xlm-roberta")


@pytest.mark.parametrize("network", EVERY_LENGTH, indirect=True)
def test_every_length_alone(network: Any) -> None:
    forward = BertClassifier(network)
    assert max(differences(network, forward, [length]) for length in range(1, longest(network) + 1)) < 1e-5


@pytest.mark.parametrize("network", sorted(NETWORKS.keys() - EVERY_LENGTH), indirect=True)
def test_lengths_alone_where_sizes_and_activations_differ(network: Any) -> None:
    """How these are computed does not depend on the length, and the card's architecture takes its time."""
    forward = BertClassifier(network)
    lengths = [*range(1, 33), *range(33, longest(network), 37), longest(network)]
    assert max(differences(network, forward, [length]) for length in lengths) < 1e-5


def test_mixed_lengths(network: Any) -> None:
    forward = BertClassifier(network)
    draw = np.random.default_rng(5)
    for bound in (2, 9, 60, 200, longest(network)):
        assert differences(network, forward, draw.integers(1, min(bound, longest(network)) + 1, 9).tolist()) < 1e-5


@pytest.mark.parametrize("kind", [PlainLinear, PackedLinear])
@pytest.mark.parametrize("fused_from", [0, bert_module.NEVER])
@pytest.mark.parametrize("order", [TEXT_BY_TEXT, TOKEN_BY_TOKEN])
def test_whichever_way_was_measured_to_be_faster(
    network: Any, kind: type[PlainLinear], fused_from: int, order: int
) -> None:
    forward = BertClassifier(network, linear=kind, fused_from=fused_from, order=order)
    assert differences(network, forward, [7]) < 1e-5
    assert differences(network, forward, [40, 33, 2, 1]) < 1e-5


def test_what_is_not_given_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind, fused_from in ((PlainLinear, 0), (PackedLinear, 77)):
        monkeypatch.setattr(bert_module, "_fastest_linear", lambda _, kind=kind: kind)
        monkeypatch.setattr(bert_module, "_fused_from", lambda *_, fused_from=fused_from: fused_from)
        forward = BertClassifier(bert())
        assert type(forward._last._up) is kind
        assert forward._fused_from == fused_from


def test_without_onednn_torch_s_own_product_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("no such product")

    monkeypatch.setattr(PackedLinear, "__init__", fail)
    network = bert()
    assert is_alike(BertClassifier(network), network)


def test_a_text_with_no_number_keeps_it_to_itself() -> None:
    network = bert()
    with torch.no_grad():
        network.bert.embeddings.word_embeddings.weight[7] = torch.nan
    ids = torch.tensor([[9, 7, 9], [9, 9, 0], [9, 9, 9]])
    with torch.inference_mode():
        finite = BertClassifier(network)(ids, torch.tensor([3, 2, 3])).isfinite().all(-1)
    assert finite.tolist() == [False, True, True]


def test_a_model_of_another_family_keeps_its_own_forward(caplog: pytest.LogCaptureFixture) -> None:
    network = AlbertForSequenceClassification(AlbertConfig(**SIZES, embedding_size=8)).eval()
    assert not is_covered(network)
    with caplog.at_level(logging.INFO):
        forward = choose_forward(network)
    assert [record.message for record in caplog.records] == [
        "transformers computes this model: BertClassifier does not cover a AlbertForSequenceClassification"
    ]
    assert differences(network, forward, [7, 3]) < 1e-5


def test_a_model_that_answers_otherwise_keeps_its_own_forward(caplog: pytest.LogCaptureFixture) -> None:
    network = bert()
    torch.nn.init.normal_(network.bert.pooler.dense.weight)
    network.bert.pooler.activation = torch.nn.Identity()
    with caplog.at_level(logging.INFO):
        forward = choose_forward(network)
    assert not isinstance(forward, BertClassifier)
    assert len(caplog.records) == 1
    assert differences(network, forward, [7, 3]) < 1e-5


def test_a_loaded_checkpoint_is_computed_by_bert_classifier(checkpoint: Path) -> None:
    for name in (str(checkpoint), "builtin"):
        run = SentimentModel.load(name, device="cpu", backend="torch")._run
        assert isinstance(run, PaddedPasses)
        assert isinstance(run._forward, NumpyForward)
        assert isinstance(run._forward._forward, BertClassifier)
        assert 8 <= run.pass_tokens <= 128


def test_widened_heads_give_the_same_logits(network: Any) -> None:
    if not is_covered(network):
        pytest.skip("takes its own forward")
    ids = torch.randint(8, 300, (5, 33), generator=torch.Generator().manual_seed(0))
    lengths = torch.tensor([33, 7, 1, 20, 12])
    with torch.inference_mode():
        plain = BertClassifier(network, linear=PlainLinear, fused_from=bert_module.NEVER)(ids, lengths)
        for fused_from in (0, bert_module.NEVER):
            for order in (TEXT_BY_TEXT, TOKEN_BY_TOKEN):
                wide = BertClassifier(network, linear=PlainLinear, fused_from=fused_from, head_multiple=8, order=order)
                assert wide._last.head_size % 8 == 0
                torch.testing.assert_close(wide(ids, lengths), plain, rtol=1e-5, atol=1e-5)
