"""The network of a BERT-like classifier without the work that its answer does not need. Knows torch, not transformers.

It gives the logits of the checkpoint's own network, but for rounding, and is faster because

- query, key and value are one product in torch, and are not copied apart in ONNX Runtime;
- the last layer is computed for the first token alone, as far as the head reads no other: a quarter of three layers;
- on a CPU, products go through oneDNN with weights that are packed once, where that is measured to be faster;
- on a GPU, heads are widened with zeros to a multiple of eight, without which its fused attention refuses them;
- attention in torch on a CPU is computed by the way that is measured to be faster for the head's size and the texts'
  length; on a GPU by the fused kernel.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any, Final, Self

import torch
from torch import Tensor
from torch.nn import functional

FAMILY: Final = {"bert", "roberta", "xlm-roberta", "camembert"}
EXAMPLE_TOKENS: Final = 512  # of what is measured: about one device batch on a CPU
ATTENTION_LENGTHS: Final = (512, 384, 256, 192, 128, 96, 64)  # the longer, the better for the fused kernel
NEVER: Final = 2**31
PATIENCE_S: Final = 0.05
GPU_HEAD_SIZES: Final = 8  # a multiple of it

# The order of rows, as the axis of time in their shape: (N, T) or (T, N). Token by token a head's rows are a fixed step
# apart across a whole batch, so ONNX Runtime multiplies them where they lie; torch's fused attention writes text by text.
TEXT_BY_TEXT: Final = 1
TOKEN_BY_TOKEN: Final = 0

Linear = Callable[[Tensor], Tensor]
Forward = Callable[[Tensor, Tensor | None], Tensor]  # as LeanNetwork.__call__


class LeanNetwork:
    """Token ids → logits. Blocks for as long as the network takes; several threads may call at once."""

    def __init__(
        self,
        network: Any,
        *,
        linear: "LinearKind | None" = None,
        fused_from: int | None = None,
        head_sizes: int | None = None,
        order: int = TEXT_BY_TEXT,
    ) -> None:
        """From a network that ``is_covered``; its weights are copied as far as they are packed anew.

        ``linear`` and ``fused_from``, the shortest text whose attention takes the fused kernel, are measured if not given.
        ``head_sizes``: heads are widened to a multiple of it; by default to what the device's kernels ask for.
        ``order`` of the rows in between, TEXT_BY_TEXT or TOKEN_BY_TOKEN: the answer is the same.
        """
        config = network.config
        body = network.base_model
        if head_sizes is None:
            head_sizes = GPU_HEAD_SIZES if network.device.type == "cuda" else 1
        kind = linear or _fastest_linear(body.encoder.layer[0].attention.self.query)
        activation = config.hidden_act if isinstance(config.hidden_act, str) else ""
        *earlier, last = body.encoder.layer
        self._time = order
        self._embeddings = _Embeddings(body.embeddings, _first_position(config), order)
        self._layers = [_Layer(layer, kind, activation, head_sizes, order) for layer in earlier]
        self._last = _LastLayer(last, kind, activation, head_sizes, order)
        self._head = _head(network)
        if fused_from is None:
            fused_from = _fused_from(self._last.heads, self._last.head_size, network.dtype, network.device)
        self._fused_from = fused_from

    def __call__(self, ids: Tensor, lengths: Tensor | None) -> Tensor:
        """Logits (N, labels) of ids (N, T), where the n-th text is the first ``lengths[n]``; None: all are of length T."""
        width = ids.shape[1]
        ids = ids.movedim(1, self._time)
        hidden = self._embeddings(ids)
        bias = None if lengths is None else _padding_bias(lengths, width, hidden.dtype)
        attend = _by_fused_kernel if width >= self._fused_from else _by_products
        for layer in self._layers:
            hidden = layer(hidden, ids.shape, bias, attend)
        return self._head(self._last(hidden, ids.shape, bias))


def is_covered(network: Any) -> bool:
    """Whether LeanNetwork can stand in for this network."""
    config = network.config
    return (
        config.model_type in FAMILY
        and type(network).__name__.endswith("ForSequenceClassification")
        and not config.is_decoder
        and getattr(config, "position_embedding_type", "absolute") == "absolute"
        and not getattr(config, "add_cross_attention", False)
    )


def is_alike(lean: Forward, network: Any) -> bool:
    """Whether both give the same logits, but for rounding, on texts of several lengths. A last look before it is used."""
    lengths = torch.tensor([9, 5, 1], device=network.device)
    ids = (torch.arange(27, device=network.device) * 37 % (network.config.vocab_size - 8) + 8).view(3, 9)
    mask = torch.arange(9, device=network.device) < lengths[:, None]
    with torch.inference_mode():
        wanted = network(input_ids=ids, attention_mask=mask.long()).logits.float()
        given = lean(ids, lengths).float()
    tolerance = 1e-4 if network.dtype == torch.float32 else 5e-2
    return torch.allclose(given, wanted, rtol=tolerance, atol=tolerance, equal_nan=True)


class _Embeddings:
    """Ids (N, T), or (T, N) in that order → rows (N · T, width)."""

    def __init__(self, source: Any, first_position: int, order: int) -> None:
        positions = source.position_embeddings.weight[first_position:]
        self._words = source.word_embeddings.weight
        self._positions = (positions + source.token_type_embeddings.weight[0]).contiguous()
        self._norm = source.LayerNorm
        self._time = order

    def __call__(self, ids: Tensor) -> Tensor:
        positions = self._positions[: ids.shape[self._time]].unsqueeze(1 - self._time)
        sums = functional.embedding(ids, self._words).add_(positions)
        return _normed(sums.view(-1, sums.shape[-1]), self._norm)


class _Block:
    """What every layer does alike: rows as heads and back, and what follows attention."""

    def __init__(self, source: Any, kind: "LinearKind", activation: str, head_sizes: int, order: int) -> None:
        attention = source.attention.self
        self._time = order
        self.heads: int = attention.num_attention_heads
        self.head_size: int = -(-attention.attention_head_size // head_sizes) * head_sizes
        self._extra = self.head_size - int(attention.attention_head_size)
        self._output = kind.of(self._from_heads(_weights(source.attention.output.dense)))
        self._output_norm = source.attention.output.LayerNorm
        self._up = kind.of(_weights(source.intermediate.dense), is_gelu=activation == "gelu")
        self._activation = None if activation == "gelu" else source.intermediate.intermediate_act_fn
        self._down = kind.of(_weights(source.output.dense))
        self._down_norm = source.output.LayerNorm

    def _to_heads(self, *layers: tuple[Tensor, Tensor]) -> list[tuple[Tensor, Tensor]]:
        """Layers whose outputs are heads, with zeros behind each head: they add nothing to a score or a sum."""
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
        """The layer that reads heads, with zeros for what is behind each."""
        weight, bias = layer
        if not self._extra:
            return layer
        return functional.pad(weight.view(len(weight), self.heads, -1), (0, self._extra)).flatten(1, 2), bias

    def _heads(self, rows: Tensor, *shape: int) -> Tensor:
        """Rows (M, heads · size), whose order has this shape → (N, heads, T, size)."""
        return rows.view(*shape, self.heads, self.head_size).movedim((1 - self._time, self._time), (0, 2))

    def _rows(self, heads: Tensor) -> Tensor:
        """(N, heads, T, size) → rows (N · T, heads · size)."""
        return heads.movedim((0, 2), (1 - self._time, self._time)).reshape(-1, self.heads * self.head_size)

    def _finished(self, attended: Tensor, residual: Tensor) -> Tensor:
        """What heads gave (M, heads · size), and what the layer was given (M, width) → the layer's rows (M, width)."""
        hidden = _normed(self._output(attended).add_(residual), self._output_norm)
        wide = self._up(hidden)
        if self._activation is not None:
            wide = self._activation(wide)
        return _normed(self._down(wide).add_(hidden), self._down_norm)


class _Layer(_Block):
    def __init__(self, source: Any, kind: "LinearKind", activation: str, head_sizes: int, order: int) -> None:
        super().__init__(source, kind, activation, head_sizes, order)
        attention = source.attention.self
        self._query_key_value = kind.of(
            *self._to_heads(_query_weights(attention), _weights(attention.key), _weights(attention.value))
        )

    def __call__(self, hidden: Tensor, shape: Sequence[int], bias: Tensor | None, attend: "Attend") -> Tensor:
        query, key, value = (self._heads(rows, *shape) for rows in self._query_key_value.each(hidden))
        return self._finished(self._rows(attend(query, key, value, bias)), hidden)


class _LastLayer(_Block):
    """The layer of which only the first token's row is used: rows (N · T, width) → rows (N, width)."""

    def __init__(self, source: Any, kind: "LinearKind", activation: str, head_sizes: int, order: int) -> None:
        super().__init__(source, kind, activation, head_sizes, order)
        attention = source.attention.self
        self._query = kind.of(*self._to_heads(_query_weights(attention)))
        self._key_value = kind.of(*self._to_heads(_weights(attention.key), _weights(attention.value)))

    def __call__(self, hidden: Tensor, shape: Sequence[int], bias: Tensor | None) -> Tensor:
        first = hidden.view(*shape, -1).select(self._time, 0)
        query = self._heads(self._query(first), *(1 if axis == self._time else shape[axis] for axis in (0, 1)))
        key, value = (self._heads(rows, *shape) for rows in self._key_value.each(hidden))
        return self._finished(self._rows(_by_products(query, key, value, bias)), first)


# Products.


class PlainLinear:
    """torch's own product of rows, (M, in) → (M, out)."""

    def __init__(self, weight: Tensor, bias: Tensor, is_gelu: bool = False, widths: Sequence[int] = ()) -> None:
        self._weight = weight
        self._bias = bias
        self._is_gelu = is_gelu
        self._widths = list(widths) or [len(bias)]

    @classmethod
    def of(cls, *layers: tuple[Tensor, Tensor], is_gelu: bool = False) -> Self:
        """From layers of the same input; a call gives their outputs side by side."""
        weights, biases = zip(*layers, strict=True)
        return cls(torch.cat(weights), torch.cat(biases), is_gelu, [len(bias) for bias in biases])

    def each(self, rows: Tensor) -> Sequence[Tensor]:
        """The output of each layer that it was made of, (M, that layer's out)."""
        return torch.split(self(rows), self._widths, -1)

    def __call__(self, rows: Tensor) -> Tensor:
        product = functional.linear(rows, self._weight, self._bias)
        return functional.gelu(product) if self._is_gelu else product


class PackedLinear(PlainLinear):
    """oneDNN's product over packed weights, with GELU in the same pass; torch's compiler makes the same calls."""

    def __init__(self, weight: Tensor, bias: Tensor, is_gelu: bool = False, widths: Sequence[int] = ()) -> None:
        super().__init__(torch.ops.mkldnn._reorder_linear_weight(weight, EXAMPLE_TOKENS), bias, is_gelu, widths)
        self._after = ("gelu", "none") if is_gelu else ("none", "")

    def __call__(self, rows: Tensor) -> Tensor:
        name, algorithm = self._after
        product: Tensor = torch.ops.mkldnn._linear_pointwise(rows, self._weight, self._bias, name, [], algorithm)
        return product


LinearKind = type[PlainLinear]


def _fastest_linear(layer: Any) -> LinearKind:
    """By measuring: oneDNN was 2.2 times as fast as torch's default on an AMD with AVX-512, and level with AVX2."""
    if layer.weight.device.type != "cpu":
        return PlainLinear
    rows = torch.linspace(-1, 1, EXAMPLE_TOKENS * layer.in_features, dtype=layer.weight.dtype)
    rows = rows.view(EXAMPLE_TOKENS, layer.in_features)
    with torch.inference_mode():
        try:
            plain, packed = (kind.of(*[_weights(layer)] * 3, is_gelu=True) for kind in (PlainLinear, PackedLinear))
            is_right = torch.allclose(plain(rows), packed(rows), rtol=1e-4, atol=1e-4)
        except (AttributeError, RuntimeError):  # this torch, or this number type, has no such product
            return PlainLinear
        return PackedLinear if is_right and seconds(packed, rows) < seconds(plain, rows) else PlainLinear


# Attention: a scaled query (N, heads, T or 1, size), key and value (N, heads, T, size), bias (N, 1, 1, T) → as the query.

Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]


def _by_products(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
    scores = torch.matmul(query, key.transpose(-1, -2))
    if bias is not None:
        scores = scores.add_(bias)
    return torch.matmul(scores.softmax(-1), value)


def _by_fused_kernel(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
    return functional.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=1.0)


def _fused_from(heads: int, size: int, dtype: torch.dtype, device: torch.device) -> int:
    """From which length on the fused kernel is the faster one; NEVER, if it is not."""
    if device.type != "cpu":
        return 0
    fastest_from = NEVER
    with torch.inference_mode():
        for length in ATTENTION_LENGTHS:
            parts = torch.zeros(max(1, EXAMPLE_TOKENS // length), length, 3, heads, size, dtype=dtype)
            query, key, value = parts.permute(2, 0, 3, 1, 4)
            if seconds(_by_fused_kernel, query, key, value, None) > seconds(_by_products, query, key, value, None):
                break
            fastest_from = length
    return fastest_from


# Parts.


def _weights(layer: Any) -> tuple[Tensor, Tensor]:
    return layer.weight.detach(), layer.bias.detach()


def _query_weights(attention: Any) -> tuple[Tensor, Tensor]:
    """With the scale of attention's scores in them."""
    weight, bias = _weights(attention.query)
    scale = attention.attention_head_size**-0.5
    return weight * scale, bias * scale


def _normed(rows: Tensor, norm: Any) -> Tensor:
    return functional.layer_norm(rows, norm.normalized_shape, norm.weight, norm.bias, norm.eps)


def _padding_bias(lengths: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    is_padding = torch.arange(width, device=lengths.device) >= lengths[:, None]
    return torch.zeros(is_padding.shape, dtype=dtype, device=lengths.device).masked_fill_(is_padding, -torch.inf)[
        :, None, None
    ]


def _first_position(config: Any) -> int:
    """RoBERTa's positions begin behind the id of padding."""
    return 0 if config.model_type == "bert" else int(config.pad_token_id) + 1


def _head(network: Any) -> Callable[[Tensor], Tensor]:
    """From the first token's row (N, width) to the logits (N, labels)."""
    if network.config.model_type == "bert":
        inner, outer = network.base_model.pooler.dense, network.classifier
    else:
        inner, outer = network.classifier.dense, network.classifier.out_proj

    def logits(first: Tensor) -> Tensor:
        answer: Tensor = outer(torch.tanh(inner(first)))
        return answer

    return logits


def seconds(function: Callable[..., object], *arguments: Any) -> float:
    """The shortest of a few runs: of what a noisy machine shows, the nearest to the truth."""
    runs: list[float] = []
    while len(runs) < 2 or (len(runs) < 8 and sum(runs) < PATIENCE_S):
        started = time.perf_counter()
        function(*arguments)
        runs.append(time.perf_counter() - started)
    return min(runs[1:])
