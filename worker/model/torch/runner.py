"""How a transformers model is computed on its device: number type, token budget, and passes at once."""

from functools import partial
from typing import Any

import torch

from worker.model.autotune import tune_budget
from worker.model.runner import PreparedRunner, RunnerOptions, prepare_cpu_runner
from worker.model.torch.backends import NumpyForward, choose_cuda_forward, choose_forward, name_of
from worker.model.torch.cuda import PASSES, passes_on


def prepare_torch_runner(model: Any, options: RunnerOptions, *, dtype: str) -> PreparedRunner:
    """A runner for a transformers model on its device. Blocks for about a second on a CPU, on a GPU for some.

    ``dtype``: as in settings; ``auto`` on a GPU is float16 where labels agree.
    """
    if model.device.type == "cpu":
        forward = NumpyForward(choose_forward(model), model.device)
        return prepare_cpu_runner(forward, options, backend="torch", dtype=name_of(model.dtype))
    choice = choose_cuda_forward(model, dtype=dtype, columns=options.columns, examples=options.examples)
    budget = options.max_batch_tokens
    if budget == "auto":
        measured = NumpyForward(choice.forward, model.device)
        budget = tune_budget(measured, model.device.type, options.max_tokens, options.tuning_s)
    run = passes_on(
        model.device,
        choice.forward,
        choice.exact,
        longest=options.max_tokens,
        budget=budget,
        labels=model.config.num_labels,
        padding=options.padding,
    )
    memory_bytes = partial(torch.cuda.memory_allocated, model.device)
    return PreparedRunner(run, PASSES, "torch", choice.dtype, budget, memory_bytes)
