"""config.json is read with transformers' defaults, weights are found under transformers' names, and the rest is refused."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors.numpy import save_file
from transformers import AutoConfig, AutoModelForSequenceClassification

from tests.unit.test_onnx_model import SIZES
from worker.model.checkpoint import ModelError
from worker.model.onnx import quantization
from worker.model.onnx.architecture import Architecture, NotCovered, architecture_of
from worker.model.onnx.quantization import needs_reduced_range, quantized
from worker.model.onnx.weights import weight_shapes, weights_of

MODEL_TYPES = ["bert", "roberta", "xlm-roberta", "camembert"]
BERT = {"model_type": "bert", **SIZES}


def shapes_in_transformers(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        network = AutoModelForSequenceClassification.from_config(AutoConfig.for_model(**config))
    return {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_what_config_json_leaves_out_is_as_in_transformers(model_type: str) -> None:
    config = AutoConfig.for_model(model_type)
    architecture = architecture_of({"model_type": model_type})
    assert weight_shapes(architecture) == shapes_in_transformers({"model_type": model_type})
    assert architecture.heads == config.num_attention_heads
    assert architecture.activation == config.hidden_act
    assert architecture.norm_epsilon == config.layer_norm_eps
    assert architecture.first_position == (0 if model_type == "bert" else config.pad_token_id + 1)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
@pytest.mark.parametrize("labels", [{"num_labels": 4}, {"id2label": {"0": "a", "1": "b", "2": "c"}}, {}])
def test_names_and_shapes_are_those_of_transformers(model_type: str, labels: dict[str, Any]) -> None:
    sizes = {name: size for name, size in SIZES.items() if name != "num_labels"}
    config = {"model_type": model_type, **sizes, "type_vocab_size": 3, "max_position_embeddings": 77, **labels}
    assert weight_shapes(architecture_of(config)) == shapes_in_transformers(config)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"model_type": "albert"}, "its model_type is 'albert', not one of bert, roberta, xlm-roberta, camembert"),
        ({"model_type": None}, "its model_type is None"),
        ({"hidden_act": "prelu"}, "its hidden_act is 'prelu', not one of gelu"),
        ({"hidden_act": ["gelu"]}, "its hidden_act is"),
        (
            {"position_embedding_type": "relative_key"},
            "its position_embedding_type is 'relative_key', not absolute",
        ),
        ({"is_decoder": True}, "its config.json sets is_decoder"),
        ({"add_cross_attention": True}, "its config.json sets add_cross_attention"),
        ({"quantization_config": {"bits": 4}}, "its config.json sets quantization_config"),
    ],
)
def test_what_the_graph_does_not_cover(changes: dict[str, Any], why: str) -> None:
    with pytest.raises(NotCovered) as refused:
        architecture_of({**BERT, **changes})
    assert str(refused.value).startswith(why)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"hidden_size": "24"}, "hidden_size in config.json is '24'; it should be a whole number, 1 or more"),
        ({"num_hidden_layers": 0}, "num_hidden_layers in config.json is 0; it should be a whole number, 1 or more"),
        ({"vocab_size": None}, "vocab_size in config.json is None; it should be a whole number, 1 or more"),
        (
            {"intermediate_size": True},
            "intermediate_size in config.json is True; it should be a whole number, 1 or more",
        ),
        ({"num_attention_heads": 5}, "hidden_size in config.json is 24; it should be a multiple of 5 heads"),
        ({"layer_norm_eps": "1e-5"}, "layer_norm_eps in config.json is '1e-5'; it should be a small number from 0 up"),
        (
            {"layer_norm_eps": float("nan")},
            "layer_norm_eps in config.json is nan; it should be a small number from 0 up",
        ),
        ({"num_labels": -1}, "num_labels in config.json is -1; it should be a whole number, 1 or more"),
        (
            {"model_type": "roberta", "pad_token_id": None},
            "pad_token_id in config.json is None; it should be a whole number from 0 to 510",
        ),
    ],
)
def test_a_wrong_value_is_said_in_a_sentence(changes: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match=r"config\.json") as refused:
        architecture_of({**BERT, **changes})
    assert str(refused.value).startswith(why)


def file_of(architecture: Architecture) -> dict[str, NDArray[np.float32]]:
    return {name: np.zeros(shape, np.float32) for name, shape in weight_shapes(architecture).items()}


@pytest.mark.parametrize("model_type", ["bert", "roberta"])
def test_names_are_matched_as_transformers_does(model_type: str, tmp_path: Path) -> None:
    """Old names of layer norms, the prefix where it does not belong or missing where it does, and what nobody needs."""
    architecture = architecture_of({**BERT, "model_type": model_type})
    prefix = architecture.prefix
    wanted = file_of(architecture)
    odd = {f"{prefix}.embeddings.position_ids": np.zeros((1, 512)), "cls.predictions.bias": np.zeros(3)}
    for number, (name, weight) in enumerate(wanted.items()):
        renamed = name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
        if name.startswith("classifier"):
            renamed = f"{prefix}.{renamed}"
        odd[renamed.removeprefix(f"{prefix}.") if number % 2 else renamed] = weight
    found = weights_of("here", architecture, odd)
    assert found.keys() == wanted.keys()
    assert all(found[name] is weight for name, weight in wanted.items())
    AutoConfig.for_model(**{**BERT, "model_type": model_type}).save_pretrained(tmp_path)
    save_file({name: weight.copy() for name, weight in odd.items()}, tmp_path / "model.safetensors")
    network, loading = AutoModelForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not loading["missing_keys"]
    assert not any(parameter.any() for parameter in network.parameters())


def test_a_file_that_lacks_weights_is_no_finished_classifier() -> None:
    architecture = architecture_of(BERT)
    file = file_of(architecture)
    del file["classifier.weight"], file["bert.pooler.dense.bias"]
    with pytest.raises(ModelError) as refused:
        weights_of("here", architecture, file)
    assert str(refused.value) == (
        "model here is no finished classifier: its file lacks 2 weights (bert.pooler.dense.bias, …), which would be random"
    )


def test_weights_of_other_sizes_are_refused() -> None:
    architecture = architecture_of(BERT)
    file = {**file_of(architecture), "bert.embeddings.word_embeddings.weight": np.zeros((299, 24), np.float32)}
    with pytest.raises(ModelError) as refused:
        weights_of("here", architecture, file)
    assert str(refused.value) == (
        "model here cannot be loaded: its weights have other sizes than its config.json states "
        "(bert.embeddings.word_embeddings.weight is of 299 × 24 numbers, and should be of 300 × 24)"
    )


@given(st.integers(1, 9), st.integers(1, 9), st.booleans(), st.integers(0, 9))
def test_quantized_weights_are_as_near_as_their_scale_allows(
    outputs: int, inputs: int, has_reduced_range: bool, seed: int
) -> None:
    weight = np.random.default_rng(seed).normal(size=(outputs, inputs)).astype(np.float32)
    weight[0] = 0
    numbers, scales = quantized(weight, has_reduced_range=has_reduced_range)
    assert numbers.dtype == np.int8
    assert np.abs(numbers).max(initial=0) == (0 if outputs == 1 else 64 if has_reduced_range else 127)
    assert (np.abs(numbers * scales - weight.T) <= scales * 0.5001).all()


@pytest.mark.parametrize(
    ("cpuinfo", "is_needed"),
    [
        ("flags\t\t: fpu avx2 avx512_vnni gfni\n", False),
        ("flags\t\t: fpu avx2 avx_vnni\n", False),
        ("Features\t: fp asimd asimddp\n", False),
        ("flags\t\t: fpu avx2 avx512f\n", True),
        ("", True),
        (None, True),
    ],
)
def test_without_dot_products_of_bytes_numbers_have_seven_bits(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, cpuinfo: str | None, is_needed: bool
) -> None:
    file = tmp_path / "cpuinfo"
    if cpuinfo is not None:
        file.write_text(cpuinfo)
    monkeypatch.setattr(quantization, "CPUINFO", file)
    needs_reduced_range.cache_clear()
    try:
        assert needs_reduced_range() == is_needed
    finally:
        needs_reduced_range.cache_clear()
