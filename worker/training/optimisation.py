"""Batches of token ids, and the optimiser that trains on them: what pre-training and fine-tuning share."""

import math
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from worker.training.progress import Progress
from worker.training.training_run import Diverged, TrainingRun

Batch = list[int]
"""Places of rows in the list they come from."""


def token_ids(tokenizer: Any, texts: list[str], max_tokens: int) -> list[list[int]]:
    """The token ids of each text, cut to `max_tokens`, special tokens among them."""
    ids: list[list[int]] = tokenizer(texts, truncation=True, max_length=max_tokens)["input_ids"]
    return ids


def most_tokens(tokenizer: Any, model: Any) -> int:
    """The most tokens that the model can read, and never more than 512: some checkpoints state no maximum."""
    return int(min(tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", 512), 512))


def shuffled_batches(lengths: Sequence[int], size: int, rng: random.Random) -> list[Batch]:
    """One epoch's batches of `size` rows: random, but with rows of similar length together, so that little is padding."""
    order = list(range(len(lengths)))
    rng.shuffle(order)
    batches = []
    for start in range(0, len(order), 50 * size):
        window = sorted(order[start : start + 50 * size], key=lengths.__getitem__)
        batches += [window[at : at + size] for at in range(0, len(window), size)]
    rng.shuffle(batches)
    return batches


def padded(rows: Sequence[list[int]], pad: int, device: torch.device) -> Tensor:
    """B rows of token ids → (B, longest), padded at the right."""
    longest = max(map(len, rows))
    return torch.tensor([row + [pad] * (longest - len(row)) for row in rows], device=device)


def hidden_tokens(ids: Tensor, tokenizer: Any, share: float) -> Tensor:
    """A random mask of the shape of `ids`: true for about `share` of the tokens, never for a special one."""
    special = torch.tensor(sorted(set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}), device=ids.device)
    return (torch.rand(ids.shape, device=ids.device) < share) & ~torch.isin(ids, special)


def optimise(
    run: TrainingRun,
    parameters: Sequence[Tensor],
    batches: Sequence[Batch],
    loss_of: Callable[[Batch], Tensor],
    rate: float,
    stage: str,
    stepped: Callable[[int], bool] = lambda done: False,
) -> None:
    """Trains `parameters` by AdamW, a step for each batch, and calls `stepped` with the number of each step, from 1.

    If that answers true, the training ends there. The learning rate rises linearly to `rate` over the first tenth of the
    steps, and falls linearly to 0. Raises Diverged.
    """
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": 0.01},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimiser = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.98), fused=True)
    warm = max(1, len(batches) // 10)
    for number, batch in enumerate(batches):
        for group in optimiser.param_groups:
            group["lr"] = rate * min((number + 1) / warm, (len(batches) - number) / max(1, len(batches) - warm))
        optimiser.zero_grad()
        with torch.autocast(run.device.type, torch.bfloat16, enabled=run.options.precision == "bfloat16"):
            loss = loss_of(batch)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        value = loss.item()
        if not math.isfinite(value):
            raise Diverged(
                f"the training diverged: at step {number + 1} of {len(batches)} ({stage}) the loss is no finite number; "
                f"take a lower learning rate (its peak was {rate:g}); nothing was written"
            )
        ended = stepped(number + 1)
        run.report(Progress(stage, number + 1, len(batches), f"loss {value:.3f}"))
        if ended:
            return


class WeightMean:
    """The running mean of `parameters` over the `steps` of a training."""

    def __init__(self, parameters: list[Tensor], decay: float) -> None:
        self.parameters = parameters
        self.steps = 0
        self._decay = decay
        self._values = copies(parameters)

    def add(self, step: int) -> None:
        """Adds the parameters as they are after a step, counted from 1."""
        with torch.no_grad():
            # A short memory at first keeps the untrained start out of the mean.
            torch._foreach_lerp_(self._values, self.parameters, 1 - min(self._decay, step / (step + 10)))
        self.steps = step

    def values(self) -> list[Tensor]:
        """The mean as it is now, in tensors of its own."""
        return copies(self._values)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside, the parameters are set to their mean; afterwards they are what they were."""
        before = copies(self.parameters)
        assign(self.parameters, self._values)
        try:
            yield
        finally:
            assign(self.parameters, before)


def copies(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Tensors of their own with the same values, without gradients."""
    return [tensor.detach().clone() for tensor in tensors]


def assign(parameters: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Sets the parameters to these values, in place."""
    with torch.no_grad():
        for parameter, value in zip(parameters, values, strict=True):
            parameter.copy_(value)
