"""How a transformers model is computed on its device: number type, token budget, and passes at once."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from worker.core.batching import TokenIds
from worker.model.autotune import tune_budget
from worker.model.runner import PreparedRunner, RunnerOptions, prepare_cpu_runner
from worker.model.torch.backends import NumpyForward, choose_cuda_forward, choose_forward, name_of
from worker.model.torch.cuda import PASSES, Passes, passes_on
from worker.model.torch.pass_choice import Gpu, choose_unpadded, gpu_of


def prepare_torch_runner(model: Any, options: RunnerOptions, *, dtype: str) -> PreparedRunner:
    """A runner for a transformers model on its device. Blocks for about a second on a CPU, on a GPU for some.

    ``dtype``: as in settings; ``auto`` on a GPU is float16 where labels agree.
    """
    if model.device.type == "cpu":
        forward = NumpyForward(choose_forward(model), model.device)
        return prepare_cpu_runner(forward, options, backend="torch", dtype=name_of(model.dtype))
    return prepare_cuda_runner(model, options, gpu_of(model.device), dtype=dtype)


def prepare_cuda_runner(model: Any, options: RunnerOptions, gpu: Gpu, *, dtype: str) -> PreparedRunner:
    """As ``prepare_torch_runner``, on the device ``gpu``."""
    choice = choose_cuda_forward(model, dtype=dtype, columns=options.columns, examples=options.examples)
    memory_bytes = partial(torch.cuda.memory_allocated, model.device)
    labels = model.config.num_labels

    def padded(budget: int, batches: Sequence[Sequence[TokenIds]] | None = None) -> Passes:
        return passes_on(
            model.device,
            choice.forward,
            choice.exact,
            longest=options.max_tokens,
            budget=budget,
            labels=labels,
            padding=options.padding,
            batches=batches,
        )

    tokens = options.max_batch_tokens
    if options.cuda_pass != "padded":
        unpadded = choose_unpadded(choice, options, padded, gpu, labels=labels)
        if unpadded:
            return PreparedRunner(unpadded, PASSES, "torch", choice.dtype, unpadded.max_batch_tokens, memory_bytes)
    if tokens == "auto":
        measured = NumpyForward(choice.forward, model.device)
        tokens = tune_budget(measured, model.device.type, options.max_tokens, options.tuning_s)
    return PreparedRunner(padded(tokens), PASSES, "torch", choice.dtype, tokens, memory_bytes)
