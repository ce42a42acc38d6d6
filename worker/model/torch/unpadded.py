"""Computes a BERT or RoBERTa classifier for texts that stand one behind another in one row, without padding.

The logits are those of BertClassifier, except for rounding. Attention gets the place where each text begins and ends; all
other operations work on each token alone. Like BertClassifier, it computes the last layer for the first tokens only. It also
saves time in these ways:

- Fused attention needs heads whose size is a multiple of eight, so heads are widened with zeros. The kernel divides
  scores by the square root of the widened size. A factor in the query's weights turns that into the root of the
  original size, because only some versions of torch have an argument of ``varlen_attn`` for it.
- One call, ``addmm_``, computes a product and adds it to the rows before it. The product's bias needs no call of its
  own: the bias of the layer norm before it includes that bias. Where other products read the same rows, their own
  biases subtract the effect of it.

This module imports torch and not transformers. It runs on every device for which there is an ``Attend``.
"""

import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from worker.model.torch.bert import GPU_HEAD_MULTIPLE, classification_head, first_position, query_weights, weights_of

log = logging.getLogger(__name__)

Attend = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, int, int], Tensor]
"""Attention within each text. Its arguments are the first seven of ``torch.nn.attention.varlen.varlen_attn``.

They are: query (Q, heads, size), key and value (K, heads, size), each a view whose last axis is contiguous; the bounds
of each text's queries and of each text's keys, contiguous int32 (N + 1), from 0 to Q and from 0 to K; the most queries
and the most keys of a text. The result is (Q, heads, size). Scores are divided by the square root of the size. A token
attends to all tokens of its own text and to no other.
"""

PROBE_LENGTHS: Final = (1, 3, 17, 64, 200)  # tokens of the texts by which an Attend is tried
PROBE_TOLERANCE: Final = 2e-2  # of values of about 1, in half precision


class RowOfTexts(NamedTuple):
    """N texts in one row of T tokens. Each text has at least one token.

    ``numbers`` is one int32 vector on the model's device. It holds one after another: the numbers 0 to N, which are the
    bounds if each text has its first token alone (N + 1); the bounds of the texts (N + 1); their first places (N);
    their lengths (N); the token ids (T). ``texts`` is N, ``tokens`` is T, and ``longest`` is the number of tokens of
    the longest text. These three are Python's integers, so that nobody has to wait for the device to read them.
    """

    numbers: Tensor
    texts: int
    tokens: int
    longest: int


class UnpaddedBert:
    """Computes the logits (N, labels), float32, of a row of N texts. A call only queues work on the current stream."""

    def __init__(self, source: Any, attend: Attend, *, head_multiple: int = GPU_HEAD_MULTIPLE) -> None:
        """``source`` is a transformers model that ``is_covered``; this object has its number type and its device.

        It shares with ``source`` the weights that need no change, such as the embeddings of words.
        """
        body, layers = source.base_model, source.base_model.encoder.layer
        self._device = source.device
        self._words = body.embeddings.word_embeddings.weight.detach()
        positions = body.embeddings.position_embeddings.weight.detach()[first_position(source.config) :]
        self._positions = (positions + body.embeddings.token_type_embeddings.weight.detach()[0]).contiguous()
        self._norm = _Norm(body.embeddings.LayerNorm, layers[0].attention.output.dense.bias)
        following = [layer.attention.output.dense.bias for layer in layers[1:]]
        activation = source.config.hidden_act
        self._layers = [
            _UnpaddedLayer(layer, bias, attend, activation, head_multiple)
            for layer, bias in zip(layers, [*following, None], strict=True)
        ]
        self._head = classification_head(source)

    def __call__(self, row: RowOfTexts) -> Tensor:
        numbers, texts, tokens, longest = row
        parts = (texts + 1, texts + 1, texts, texts, tokens)
        firsts, bounds, begins, lengths, ids = torch.split_with_sizes(numbers, parts)
        hidden = self._embedded(ids, begins, lengths, tokens)
        for layer in self._layers[:-1]:
            hidden = layer(hidden, bounds, longest)
        return self._head(self._layers[-1].of_first_tokens(hidden, begins, firsts, bounds, longest)).float()

    def _embedded(self, ids: Tensor, begins: Tensor, lengths: Tensor, tokens: int) -> Tensor:
        positions = torch.arange(tokens, dtype=torch.int32, device=self._device)
        # With the size of its output given, repeat_interleave does not wait for the device to learn it.
        positions.sub_(torch.repeat_interleave(begins, lengths, output_size=tokens))
        words = functional.embedding(ids, self._words)
        return self._norm(words.add_(functional.embedding(positions, self._positions)))


class _Norm:
    """A layer norm whose rows carry the bias of the product that is added to them later."""

    def __init__(self, source: Any, carried: Tensor | None) -> None:
        bias = source.bias.detach()
        self._shape = source.normalized_shape
        self._weight = source.weight.detach()
        self._bias = bias if carried is None else (bias.float() + carried.detach().float()).to(bias.dtype)
        self._eps = source.eps

    def __call__(self, rows: Tensor) -> Tensor:
        return functional.layer_norm(rows, self._shape, self._weight, self._bias, self._eps)


class _UnpaddedLayer:
    """Rows (T, width) → rows (T, width), or (N, width) for first tokens alone.

    The rows that come in carry the bias of this layer's attention output; those that go out carry ``following``, the same
    bias of the next layer, None after the last one.
    """

    def __init__(
        self, source: Any, following: Tensor | None, attend: Attend, activation: str, head_multiple: int
    ) -> None:
        attention = source.attention.self
        self._attend = attend
        self._heads: int = attention.num_attention_heads
        self._size = widened(attention.attention_head_size, head_multiple)
        output, down = source.attention.output.dense, source.output.dense
        query = query_weights(attention, scale=(self._size / attention.attention_head_size) ** 0.5)
        query, key, value = (
            self._to_heads(*_reading(weights, output.bias))
            for weights in (query, weights_of(attention.key), weights_of(attention.value))
        )
        self._query, self._key_value = query, _joined(key, value)
        self._query_key_value = _joined(query, key, value)
        self._output = self._from_heads(output.weight.detach())
        self._output_norm = _Norm(source.attention.output.LayerNorm, down.bias)
        self._up = _reading(weights_of(source.intermediate.dense), down.bias)
        self._activation = functional.gelu if activation == "gelu" else source.intermediate.intermediate_act_fn
        self._down = down.weight.detach().t()
        self._down_norm = _Norm(source.output.LayerNorm, following)

    def __call__(self, hidden: Tensor, bounds: Tensor, longest: int) -> Tensor:
        query, key, value = self._each(functional.linear(hidden, *self._query_key_value), 3)
        return self._finished(self._attend(query, key, value, bounds, bounds, longest, longest), hidden)

    def of_first_tokens(self, hidden: Tensor, begins: Tensor, firsts: Tensor, bounds: Tensor, longest: int) -> Tensor:
        """``firsts``: 0 to N, the bounds of texts that have one query each."""
        first = hidden.index_select(0, begins)
        query = functional.linear(first, *self._query).view(-1, self._heads, self._size)
        key, value = self._each(functional.linear(hidden, *self._key_value), 2)
        return self._finished(self._attend(query, key, value, firsts, bounds, 1, longest), first)

    def _finished(self, attended: Tensor, residual: Tensor) -> Tensor:
        """Output of attention (M, heads, size) and the layer's input (M, width), which is overwritten → (M, width)."""
        hidden = self._output_norm(residual.addmm_(attended.flatten(1), self._output))
        wide = self._activation(functional.linear(hidden, *self._up))
        return self._down_norm(hidden.addmm_(wide, self._down))

    def _each(self, rows: Tensor, parts: int) -> Sequence[Tensor]:
        """Rows (M, parts · heads · size) → that many views (M, heads, size)."""
        return rows.view(-1, parts, self._heads, self._size).unbind(1)

    def _to_heads(self, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """Weight and bias of a product that writes heads, each head widened with zeros."""
        extra = self._size - len(bias) // self._heads
        weight = functional.pad(weight.view(self._heads, -1, weight.shape[1]), (0, 0, 0, extra)).flatten(0, 1)
        return weight, functional.pad(bias.view(self._heads, -1), (0, extra)).flatten()

    def _from_heads(self, weight: Tensor) -> Tensor:
        """The weight of the product that reads heads, widened to match, as ``addmm_`` takes it: (heads · size, width)."""
        extra = self._size - weight.shape[1] // self._heads
        return functional.pad(weight.view(len(weight), self._heads, -1), (0, extra)).flatten(1, 2).t()


def widened(size: int, multiple: int) -> int:
    """The least multiple of ``multiple`` that is not below ``size``."""
    return -(-size // multiple) * multiple


def _reading(weights: tuple[Tensor, Tensor], carried: Tensor) -> tuple[Tensor, Tensor]:
    """Weight and bias of a product over rows that carry a bias too many: its own bias takes the effect back."""
    weight, bias = weights
    return weight, (bias.float() - weight.float() @ carried.detach().float()).to(bias.dtype)


def _joined(*products: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    weights, biases = zip(*products, strict=True)
    return torch.cat(weights), torch.cat(biases)


# Attention.


def attend_by_text(
    query: Tensor, key: Tensor, value: Tensor, query_bounds: Tensor, key_bounds: Tensor, _: int, __: int
) -> Tensor:
    """An ``Attend`` that computes one text after another, on every device. It is slow, and serves to check other ones."""
    queries, keys = query_bounds.diff().tolist(), key_bounds.diff().tolist()
    parts = ((query, queries), (key, keys), (value, keys))
    of_texts = zip(*(torch.split(rows, lengths) for rows, lengths in parts), strict=True)
    return torch.cat(
        [
            functional.scaled_dot_product_attention(*(each.transpose(0, 1)[None] for each in of_text))[0].transpose(
                0, 1
            )
            for of_text in of_texts
        ]
    )


def flash_attention(
    query: Tensor, key: Tensor, value: Tensor, query_bounds: Tensor, key_bounds: Tensor, queries: int, keys: int
) -> Tensor:
    """The Flash kernel as ``varlen_attn`` calls it: without dropout, causal mask and debugging."""
    bounds = (query_bounds, key_bounds, queries, keys)
    attended: Tensor = torch.ops.aten._flash_attention_forward(query, key, value, *bounds, 0.0, False, False)[0]
    return attended


def find_varlen_attention(device: torch.device, dtype: torch.dtype, heads: int, size: int) -> Attend | None:
    """``varlen_attn`` of this version of torch, or None if it is missing or wrong for such heads on this device. Blocks.

    It tries each way to call the kernel, because signatures have changed between versions. The first is the call that
    ``varlen_attn`` makes itself: one call into torch, where ``varlen_attn`` makes four. With ``num_splits=1`` (torch 2.12
    and later) ``varlen_attn`` takes the Flash kernel, too. Without it, later versions prefer cuDNN's kernel, which makes a
    plan for each combination of sizes, and the sizes change with each pass.
    """
    try:
        from torch.nn.attention.varlen import varlen_attn  # noqa: PLC0415 - came with torch 2.10
    except ImportError:
        return None
    ways: list[Any] = [flash_attention, partial(varlen_attn, num_splits=1), varlen_attn]
    return next((way for way in ways if _is_right(way, device, dtype, heads, size)), None)


def _is_right(attend: Attend, device: torch.device, dtype: torch.dtype, heads: int, size: int) -> bool:
    """Whether an ``Attend`` agrees with ``attend_by_text``, for all tokens and for first tokens alone."""
    lengths = torch.tensor(PROBE_LENGTHS)
    ends = lengths.cumsum(0)
    bounds = functional.pad(ends, (1, 0)).to(device, torch.int32)
    firsts = torch.arange(len(lengths) + 1, dtype=torch.int32, device=device)
    values = torch.randn(int(ends[-1]), 3, heads, size, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    query, key, value = values.unbind(1)
    first = query[(ends - lengths).to(device)]
    longest = max(PROBE_LENGTHS)
    calls = ((query, key, value, bounds, bounds, longest, longest), (first, key, value, firsts, bounds, 1, longest))
    with torch.inference_mode():
        try:
            given = [attend(*call).float() for call in calls]
        except Exception as error:  # noqa: BLE001 - an unknown argument, or a device that cannot
            log.info("a way to call varlen_attn does not work here: %s", str(error).partition("\n")[0][:200])
            return False
        wanted = [attend_by_text(c[0].float(), c[1].float(), c[2].float(), *c[3:]) for c in calls]
    is_right = all(
        mine.shape == right.shape and torch.allclose(mine, right, rtol=PROBE_TOLERANCE, atol=PROBE_TOLERANCE)
        for mine, right in zip(given, wanted, strict=True)
    )
    if not is_right:
        log.info("a way to call varlen_attn gives wrong values here")
    return is_right
