"""The forward pass of a BERT or RoBERTa classifier in torch, without the work that its logits do not need.

It gives the same logits as the checkpoint's own torch model, but for rounding. What it leaves out, and why that is faster:

- In the last layer, only the first token is computed beyond its key and value, for the head reads no other token. That
  saves a quarter of the arithmetic of three layers.
- Query, key and value are one product instead of three.
- On a CPU, the weights are packed once for oneDNN instead of at each call, where measuring shows that to be faster.
- On a CPU, attention skips torch's fused kernel for lengths of text where measuring shows plain products to be faster.
- On a GPU, heads are widened with zeros to a multiple of eight, for the fused kernel does not take others.

Knows torch, not transformers.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any, Final, Self

import torch
from torch import Tensor
from torch.nn import functional

FAMILY: Final = {"bert", "roberta", "xlm-roberta", "camembert"}
EXAMPLE_TOKENS: Final = 512  # rows of a product that is measured: about one device batch on a CPU
ATTENTION_LENGTHS: Final = (512, 384, 256, 192, 128, 96, 64)  # tokens; the fused kernel gains with length
NEVER: Final = 2**31
MEASURING_S: Final = 0.05
GPU_HEAD_MULTIPLE: Final = 8

# The order of rows is given by the axis of tokens in their shape: (N, T) or (T, N). torch's fused attention writes text by
# text. Token by token is for torch's exporter to ONNX, which a benchmark compares with the graph of worker.model.onnx.
TEXT_BY_TEXT: Final = 1
TOKEN_BY_TOKEN: Final = 0

Linear = Callable[[Tensor], Tensor]
Forward = Callable[[Tensor, Tensor | None], Tensor]  # as BertClassifier.__call__


class BertClassifier:
    """Token ids → logits. A call blocks until they are computed; several threads may call at once."""

    def __init__(
        self,
        source: Any,
        *,
        linear: "LinearKind | None" = None,
        fused_from: int | None = None,
        head_multiple: int | None = None,
        order: int = TEXT_BY_TEXT,
    ) -> None:
        """``source``: a transformers model that ``is_covered``; its weights are shared where they are not packed anew.

        ``linear``, the kind of product, and ``fused_from``, the length of text from which attention takes the fused kernel,
        are measured if not given. Heads are widened to ``head_multiple``, by default to what the device's kernels take.
        ``order`` of rows, TEXT_BY_TEXT or TOKEN_BY_TOKEN, does not change the logits.
        """
        config = source.config
        body = source.base_model
        if head_multiple is None:
            head_multiple = GPU_HEAD_MULTIPLE if source.device.type == "cuda" else 1
        kind = linear or _fastest_linear(body.encoder.layer[0].attention.self.query)
        activation = config.hidden_act if isinstance(config.hidden_act, str) else ""
        *earlier, last = body.encoder.layer
        self._token_axis = order
        self._embeddings = _Embeddings(body.embeddings, first_position(config), order)
        self._layers = [_Layer(layer, kind, activation, head_multiple, order) for layer in earlier]
        self._last = _LastLayer(last, kind, activation, head_multiple, order)
        self._head = classification_head(source)
        if fused_from is None:
            fused_from = _fused_from(self._last.heads, self._last.head_size, source.dtype, source.device)
        self._fused_from = fused_from

    def __call__(self, ids: Tensor, lengths: Tensor | None) -> Tensor:
        """Logits (N, labels) of ids (N, T). Text n has ``lengths[n]`` tokens, the rest is padding; None: each text has T."""
        width = ids.shape[1]
        ids = ids.movedim(1, self._token_axis)
        hidden = self._embeddings(ids)
        bias = None if lengths is None else _padding_bias(lengths, width, hidden.dtype)
        attend = _by_fused_kernel if width >= self._fused_from else _by_products
        for layer in self._layers:
            hidden = layer(hidden, ids.shape, bias, attend)
        return self._head(self._last(hidden, ids.shape, bias))


def is_covered(model: Any) -> bool:
    """Whether BertClassifier can stand in for this transformers model, as far as its configuration tells."""
    config = model.config
    return (
        config.model_type in FAMILY
        and type(model).__name__.endswith("ForSequenceClassification")
        and not config.is_decoder
        and getattr(config, "position_embedding_type", "absolute") == "absolute"
        and not getattr(config, "add_cross_attention", False)
    )


def is_alike(forward: Forward, model: Any) -> bool:
    """Whether both give the same logits, but for rounding, for texts of several lengths. Checked before it is used."""
    lengths = torch.tensor([9, 5, 1], device=model.device)
    ids = (torch.arange(27, device=model.device) * 37 % (model.config.vocab_size - 8) + 8).view(3, 9)
    mask = torch.arange(9, device=model.device) < lengths[:, None]
    with torch.inference_mode():
        wanted = model(input_ids=ids, attention_mask=mask.long()).logits.float()
        given = forward(ids, lengths).float()
    tolerance = 1e-4 if model.dtype == torch.float32 else 5e-2
    return torch.allclose(given, wanted, rtol=tolerance, atol=tolerance, equal_nan=True)


class _Embeddings:
    """Ids (N, T), or (T, N) where rows go token by token → rows (N · T, width)."""

    def __init__(self, source: Any, first_position: int, order: int) -> None:
        positions = source.position_embeddings.weight[first_position:]
        self._words = source.word_embeddings.weight
        self._positions = (positions + source.token_type_embeddings.weight[0]).contiguous()
        self._norm = source.LayerNorm
        self._token_axis = order

    def __call__(self, ids: Tensor) -> Tensor:
        positions = self._positions[: ids.shape[self._token_axis]].unsqueeze(1 - self._token_axis)
        sums = functional.embedding(ids, self._words).add_(positions)
        return _normed(sums.view(-1, sums.shape[-1]), self._norm)


class _Block:
    """What all layers share: splitting rows into heads and joining them, and the steps after attention."""

    def __init__(self, source: Any, kind: "LinearKind", activation: str, head_multiple: int, order: int) -> None:
        attention = source.attention.self
        self._token_axis = order
        self.heads: int = attention.num_attention_heads
        self.head_size: int = -(-attention.attention_head_size // head_multiple) * head_multiple
        self._extra = self.head_size - int(attention.attention_head_size)
        self._output = kind.of(self._from_heads(weights_of(source.attention.output.dense)))
        self._output_norm = source.attention.output.LayerNorm
        self._up = kind.of(weights_of(source.intermediate.dense), is_gelu=activation == "gelu")
        self._activation = None if activation == "gelu" else source.intermediate.intermediate_act_fn
        self._down = kind.of(weights_of(source.output.dense))
        self._down_norm = source.output.LayerNorm

    def _to_heads(self, *layers: tuple[Tensor, Tensor]) -> list[tuple[Tensor, Tensor]]:
        """Weights and biases of layers that write heads, widened with zeros, which add nothing to a score or a sum."""
        if not self._extra:
            return list(layers)
        return [
            (
                functional.pad(weight.view(self.heads, -1, weight.shape[1]), (0, 0, 0, self._extra)).flatten(0, 1),
                functional.pad(bias.view(self.heads, -1), (0, self._extra)).flatten(),
            )
            for weight, bias in layers
        ]

    def _from_heads(self, layer: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Weight and bias of the layer that reads heads, widened with zeros to match."""
        weight, bias = layer
        if not self._extra:
            return layer
        return functional.pad(weight.view(len(weight), self.heads, -1), (0, self._extra)).flatten(1, 2), bias

    def _heads(self, rows: Tensor, *shape: int) -> Tensor:
        """Rows (N · T, heads · size) → (N, heads, T, size). ``shape`` of the rows: N, T or T, N, by their order."""
        return rows.view(*shape, self.heads, self.head_size).movedim((1 - self._token_axis, self._token_axis), (0, 2))

    def _rows(self, heads: Tensor) -> Tensor:
        """(N, heads, T, size) → rows (N · T, heads · size)."""
        return heads.movedim((0, 2), (1 - self._token_axis, self._token_axis)).reshape(-1, self.heads * self.head_size)

    def _finished(self, attended: Tensor, residual: Tensor) -> Tensor:
        """Output of attention (M, heads · size) and input of the layer (M, width) → output of the layer (M, width)."""
        hidden = _normed(self._output(attended).add_(residual), self._output_norm)
        wide = self._up(hidden)
        if self._activation is not None:
            wide = self._activation(wide)
        return _normed(self._down(wide).add_(hidden), self._down_norm)


class _Layer(_Block):
    """A layer that computes all tokens: rows (N · T, width) → rows (N · T, width)."""

    def __init__(self, source: Any, kind: "LinearKind", activation: str, head_multiple: int, order: int) -> None:
        super().__init__(source, kind, activation, head_multiple, order)
        attention = source.attention.self
        self._query_key_value = kind.of(
            *self._to_heads(query_weights(attention), weights_of(attention.key), weights_of(attention.value))
        )

    def __call__(self, hidden: Tensor, shape: Sequence[int], bias: Tensor | None, attend: "Attend") -> Tensor:
        query, key, value = (self._heads(rows, *shape) for rows in self._query_key_value.each(hidden))
        return self._finished(self._rows(attend(query, key, value, bias)), hidden)


class _LastLayer(_Block):
    """The last layer, which computes the first token alone: rows (N · T, width) → rows (N, width)."""

    def __init__(self, source: Any, kind: "LinearKind", activation: str, head_multiple: int, order: int) -> None:
        super().__init__(source, kind, activation, head_multiple, order)
        attention = source.attention.self
        self._query = kind.of(*self._to_heads(query_weights(attention)))
        self._key_value = kind.of(*self._to_heads(weights_of(attention.key), weights_of(attention.value)))

    def __call__(self, hidden: Tensor, shape: Sequence[int], bias: Tensor | None) -> Tensor:
        first = hidden.view(*shape, -1).select(self._token_axis, 0)
        query = self._heads(self._query(first), *(1 if axis == self._token_axis else shape[axis] for axis in (0, 1)))
        key, value = (self._heads(rows, *shape) for rows in self._key_value.each(hidden))
        return self._finished(self._rows(_by_products(query, key, value, bias)), first)


# Products.


class PlainLinear:
    """torch's own product, with GELU if wanted: rows (M, in) → (M, out)."""

    def __init__(self, weight: Tensor, bias: Tensor, is_gelu: bool = False, widths: Sequence[int] = ()) -> None:
        self._weight = weight
        self._bias = bias
        self._is_gelu = is_gelu
        self._widths = list(widths) or [len(bias)]

    @classmethod
    def of(cls, *layers: tuple[Tensor, Tensor], is_gelu: bool = False) -> Self:
        """Joins layers of the same input, given as (weight, bias); a call gives their outputs in one row."""
        weights, biases = zip(*layers, strict=True)
        return cls(torch.cat(weights), torch.cat(biases), is_gelu, [len(bias) for bias in biases])

    def each(self, rows: Tensor) -> Sequence[Tensor]:
        """Rows (M, in) → the output of each layer that was joined, (M, that layer's out)."""
        return torch.split(self(rows), self._widths, -1)

    def __call__(self, rows: Tensor) -> Tensor:
        product = functional.linear(rows, self._weight, self._bias)
        return functional.gelu(product) if self._is_gelu else product


class PackedLinear(PlainLinear):
    """oneDNN's product over packed weights, GELU included: rows (M, in) → (M, out). torch.compile emits the same calls."""

    def __init__(self, weight: Tensor, bias: Tensor, is_gelu: bool = False, widths: Sequence[int] = ()) -> None:
        super().__init__(torch.ops.mkldnn._reorder_linear_weight(weight, EXAMPLE_TOKENS), bias, is_gelu, widths)
        self._after = ("gelu", "none") if is_gelu else ("none", "")

    def __call__(self, rows: Tensor) -> Tensor:
        name, algorithm = self._after
        product: Tensor = torch.ops.mkldnn._linear_pointwise(rows, self._weight, self._bias, name, [], algorithm)
        return product


LinearKind = type[PlainLinear]


def _fastest_linear(layer: Any) -> LinearKind:
    """Measures both kinds: oneDNN was 2.2 times as fast as torch's default on an AMD with AVX-512, and level with AVX2."""
    if layer.weight.device.type != "cpu":
        return PlainLinear
    rows = torch.linspace(-1, 1, EXAMPLE_TOKENS * layer.in_features, dtype=layer.weight.dtype)
    rows = rows.view(EXAMPLE_TOKENS, layer.in_features)
    with torch.inference_mode():
        try:
            plain, packed = (kind.of(*[weights_of(layer)] * 3, is_gelu=True) for kind in (PlainLinear, PackedLinear))
            is_right = torch.allclose(plain(rows), packed(rows), rtol=1e-4, atol=1e-4)
        except (AttributeError, RuntimeError):  # this version of torch, or this dtype, has no such product
            return PlainLinear
        return PackedLinear if is_right and shortest_run_s(packed, rows) < shortest_run_s(plain, rows) else PlainLinear


# Attention: scaled query (N, heads, T or 1, size), key and value (N, heads, T, size), bias (N, 1, 1, T) → as the query.

Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]


def _by_products(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
    scores = torch.matmul(query, key.transpose(-1, -2))
    if bias is not None:
        scores = scores.add_(bias)
    return torch.matmul(scores.softmax(-1), value)


def _by_fused_kernel(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
    return functional.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=1.0)


def _fused_from(heads: int, size: int, dtype: torch.dtype, device: torch.device) -> int:
    """Measures from which length of text on, in tokens, the fused kernel is faster; NEVER if at none."""
    if device.type != "cpu":
        return 0
    fastest_from = NEVER
    with torch.inference_mode():
        for length in ATTENTION_LENGTHS:
            parts = torch.zeros(max(1, EXAMPLE_TOKENS // length), length, 3, heads, size, dtype=dtype)
            query, key, value = parts.permute(2, 0, 3, 1, 4)
            fused_s, products_s = (
                shortest_run_s(way, query, key, value, None) for way in (_by_fused_kernel, _by_products)
            )
            if fused_s > products_s:
                break
            fastest_from = length
    return fastest_from


# Parts of a transformers model.


def weights_of(layer: Any) -> tuple[Tensor, Tensor]:
    """Weight (out, in) and bias (out) of a product, without their gradients."""
    return layer.weight.detach(), layer.bias.detach()


def query_weights(attention: Any, scale: float | None = None) -> tuple[Tensor, Tensor]:
    """Weight and bias of the query, multiplied by ``scale``, by default that of attention's scores."""
    weight, bias = weights_of(attention.query)
    if scale is None:
        scale = attention.attention_head_size**-0.5
    return weight * scale, bias * scale


def _normed(rows: Tensor, norm: Any) -> Tensor:
    return functional.layer_norm(rows, norm.normalized_shape, norm.weight, norm.bias, norm.eps)


def _padding_bias(lengths: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    is_padding = torch.arange(width, device=lengths.device) >= lengths[:, None]
    return torch.zeros(is_padding.shape, dtype=dtype, device=lengths.device).masked_fill_(is_padding, -torch.inf)[
        :, None, None
    ]


def first_position(config: Any) -> int:
    """The row of the first token's position: RoBERTa's positions begin behind the id of padding."""
    return 0 if config.model_type == "bert" else int(config.pad_token_id) + 1


def classification_head(source: Any) -> Callable[[Tensor], Tensor]:
    """The classification head: the first token's rows (N, width) → logits (N, labels)."""
    if source.config.model_type == "bert":
        inner, outer = source.base_model.pooler.dense, source.classifier
    else:
        inner, outer = source.classifier.dense, source.classifier.out_proj

    def logits(first: Tensor) -> Tensor:
        answer: Tensor = outer(torch.tanh(inner(first)))
        return answer

    return logits


def shortest_run_s(function: Callable[..., object], *arguments: Any) -> float:
    """Seconds of the shortest of 2 to 8 calls, the first left out: the least disturbed by a noisy machine."""
    runs: list[float] = []
    while len(runs) < 2 or (len(runs) < 8 and sum(runs) < MEASURING_S):
        started = time.perf_counter()
        function(*arguments)
        runs.append(time.perf_counter() - started)
    return min(runs[1:])
