"""Loads the checkpoint that is fine-tuned, with a head for the three classes."""

from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from worker.model.checkpoint import folder_of
from worker.training.dataset import CLASSES
from worker.training.training_run import TrainingRun


def load_base(run: TrainingRun, base: str) -> tuple[Any, Any]:
    """Tokenizer and model of a base (a folder or a name on the hub), with its labels in the order of CLASSES.

    Notes which weights are new. Raises ValueError with one sentence. Blocks: the base may be downloaded.
    """
    try:
        source = str(folder_of(base, None) or base)
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
        config._attn_implementation = None  # what config.json chooses may be code of the hub
        names = [str(config.id2label.get(number)).strip() for number in range(len(config.id2label))]
        for name, value in label_config().items():
            setattr(config, name, value)
        model, loading = AutoModelForSequenceClassification.from_pretrained(
            source,
            config=config,
            dtype=torch.float32,
            ignore_mismatched_sizes=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except Exception as error:  # noqa: BLE001 - transformers, safetensors and tokenizers raise what they like
        reason = str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__
        raise ValueError(f"--base {base} cannot be loaded as a sequence-classification checkpoint: {reason}") from None
    if tokenizer.pad_token_id is None:
        raise ValueError(f"--base {base} has no padding token; take a checkpoint of the BERT kind")
    new = {*loading["missing_keys"], *(key for key, *_ in loading["mismatched_keys"])}
    _match_head(run, model, names, new)
    broken = not_finite(model)
    if broken:
        raise ValueError(f"--base {base} has weights that are no finite numbers ({broken}); take another checkpoint")
    return tokenizer, model


def _match_head(run: TrainingRun, model: Any, names: list[str], new: set[str]) -> None:
    """Sorts the head's rows into the order of CLASSES by their labels; makes the head new if it has other labels."""
    heads = [(name, part) for name, part in model.named_modules() if _is_head(part)]
    if not heads:
        raise ValueError("the base's head is of a kind that is not known here; take another --base")
    name, head = heads[-1]  # the encoder is defined before it
    if f"{name}.weight" not in new:
        lowered = [label.lower() for label in names]
        if sorted(lowered) == sorted(CLASSES):
            order = [lowered.index(label) for label in CLASSES]
            for weights in head.parameters():
                weights.data = weights.data[order]
        else:
            head.reset_parameters()
            new |= {f"{name}.{part}" for part, _ in head.named_parameters()}
    if new:
        had = ", ".join(repr(label[:40]) for label in names[:5]) + (", …" if len(names) > 5 else "")
        weights = ", ".join(sorted(new)[:5]) + (", …" if len(new) > 5 else "")
        run.note(f"The base has the labels {had}; made new, and not taken from it: {weights}.")


def _is_head(part: nn.Module) -> bool:
    return isinstance(part, nn.Linear) and part.out_features == len(CLASSES)


def label_config() -> dict[str, Any]:
    """What the configuration of a model for CLASSES says of its labels."""
    return {
        "num_labels": len(CLASSES),
        "id2label": dict(enumerate(CLASSES)),
        "label2id": {name: index for index, name in enumerate(CLASSES)},
        "problem_type": "single_label_classification",
    }


def not_finite(model: Any) -> str | None:
    """The name of a weight with a number that is not finite; None if there is none."""
    return next((name for name, weight in model.named_parameters() if not weight.isfinite().all()), None)
