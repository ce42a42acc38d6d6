"""Which of a checkpoint's logits are negative, neutral and positive."""

from collections.abc import Mapping
from typing import Any, Final

from worker.core.sentiment import LABELS
from worker.model.checkpoint import MAX_CHARS, ModelError

MAX_LABELS: Final = 5  # of a checkpoint, in a message
DEFAULT_COUNT: Final = 2  # of labels, in transformers, where config.json states none


def label_columns(name: str, config: Mapping[str, Any]) -> list[int]:
    """The places of negative, neutral and positive among the logits, by id2label in a checkpoint's config.json.

    Raises ModelError where it has other labels.
    """
    given = config.get("id2label") or _default_names(config.get("num_labels") or DEFAULT_COUNT)
    places = {str(label).strip().lower(): int(index) for index, label in given.items()}
    if set(places) != set(LABELS):
        labels = [str(label)[:MAX_CHARS] for label in given.values()]
        more = f" and {len(labels) - MAX_LABELS:,} more" if len(labels) > MAX_LABELS else ""
        listed = (", ".join(labels[:MAX_LABELS]) or "none") + more
        raise ModelError(
            f"model {name} cannot be loaded: its labels should be negative, neutral and positive, and this checkpoint has: "
            f"{listed}; if they mean these, rename them in its config.json (id2label)"
        )
    if sorted(places.values()) != list(range(len(LABELS))):
        raise ModelError(
            f"model {name} cannot be loaded: its labels should be numbered 0 to 2 in its config.json (id2label), and this "
            f"checkpoint has: {sorted(places.values())}"
        )
    return [places[label] for label in LABELS]


def _default_names(count: int) -> dict[str, str]:
    """The names that transformers gives to labels where config.json has no id2label."""
    return {str(number): f"LABEL_{number}" for number in range(count)}
