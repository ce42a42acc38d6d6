"""A checkpoint's labels: their names in results, how logits become probabilities, and the weights of the score."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, Literal, NamedTuple

from worker.core.sentiment import CARD, LABELS, Activation, LabelSet
from worker.model.checkpoint import MAX_CHARS, ModelError
from worker.printable import printable
from worker.settings.values import pairs_text

MAX_LISTED: Final = 5  # of a checkpoint's labels, in a message
MAX_LABELS: Final = 1_000  # each is in every result
DEFAULT_COUNT: Final = 2  # of labels, in transformers, where config.json states none
UNFIT: Final = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")  # in a name: control characters, half pairs
NAME_RULE: Final = f"give it 1 to {MAX_CHARS} characters, no control characters"
MAX_WEIGHT: Final = 1_000_000  # so that every score is finite, and has its six decimals
CARD_WEIGHTS: Final = dict(zip(LABELS, CARD.weights or (), strict=True))


class LabelOptions(NamedTuple):
    """What the settings of these names say of the labels."""

    model_labels: Mapping[str, str]
    label_scores: Mapping[str, float] | None
    activation: Activation | Literal["auto"]
    threshold: float | None


class CheckpointLabels(NamedTuple):
    """The labels of a checkpoint, the place of each among its logits, and which settings go into the model's name."""

    labels: LabelSet
    columns: list[int]
    identity: str


def checkpoint_labels(name: str, config: Mapping[str, Any], options: LabelOptions) -> CheckpointLabels:
    """The labels by id2label in a checkpoint's config.json, in the order of its logits.

    Negative, neutral and positive, in whatever order and case, come in the card's. Raises ModelError where the labels are
    not usable, or not those that the options speak of.
    """
    given = _names(name, config)
    lower = [label.lower() for label in given]
    is_card = sorted(lower) == sorted(LABELS)
    columns = [lower.index(label) for label in LABELS] if is_card else list(range(len(given)))
    own = list(LABELS) if is_card else given
    names = _renamed(name, own, [given[column] for column in columns], options.model_labels)
    usual = "sigmoid" if is_card else _usual_activation(config, len(names))
    activation = _activation(name, options, usual, len(names))
    weights = _weights(name, names, options.label_scores)
    others = {
        "model_labels": pairs_text(pair for pair in zip(own, names, strict=True) if pair[0] != pair[1]),
        "label_scores": "" if weights == _usual_weights(names) else _weights_text(names, weights or ()),
        "activation": "" if activation == usual else activation,
        "threshold": "" if options.threshold is None else f"{options.threshold:.15g}",
    }
    identity = "".join(f"+{setting}={value}" for setting, value in others.items() if value)
    return CheckpointLabels(LabelSet(tuple(names), activation, weights, options.threshold), columns, identity)


def listed(names: Iterable[str]) -> str:
    """The first labels of many, for a message."""
    shown = [_shown(label) for label in names]
    more = f" and {len(shown) - MAX_LISTED:,} more" if len(shown) > MAX_LISTED else ""
    return ", ".join(shown[:MAX_LISTED]) + more


def _names(name: str, config: Mapping[str, Any]) -> list[str]:
    """The names in the order of the logits. Raises ModelError where they cannot stand in results."""
    given = config.get("id2label") or _default_names(config.get("num_labels") or DEFAULT_COUNT)
    names = {int(number): str(label).strip() for number, label in given.items()}
    last = len(given) - 1
    if sorted(names) != list(range(len(given))):
        raise _unusable(name, f"they should be numbered 0 to {last}, and are: {listed(map(str, sorted(names)))}")
    if len(names) > MAX_LABELS:
        raise _unusable(
            name, f"there are {len(names):,}, and each result would have all; there should be {MAX_LABELS:,} at most"
        )
    in_order = [names[number] for number in range(len(names))]
    for label, count in Counter(in_order).items():
        if count > 1:
            raise _unusable(name, f"{_shown(label)} is there twice; give each a name of its own")
        if not _is_name(label):
            raise _unusable(name, f"{_shown(label)} is no name; {NAME_RULE}")
    return in_order


def _is_name(label: str) -> bool:
    return 0 < len(label) <= MAX_CHARS and not UNFIT.search(label)


def _renamed(name: str, own: Sequence[str], given: Sequence[str], renames: Mapping[str, str]) -> list[str]:
    """The names by the setting ``model_labels``; ``given`` are those in config.json, in the order of ``own``."""
    for label, new in renames.items():
        if label not in own and label not in given:
            raise ModelError(
                f"model_labels renames {_shown(label)}, which model {name} does not have; it has: {listed(given)}"
            )
        if not _is_name(new):
            raise ModelError(
                f"model_labels gives {_shown(label)} the name {_shown(new)}, which cannot be a label's; {NAME_RULE}"
            )
    for label, raw in zip(own, given, strict=True):
        if label != raw and label in renames and raw in renames:
            raise ModelError(f"model_labels renames {_shown(raw)} and {label}, which are one label of model {name}")
    names = [renames.get(label, renames.get(raw, label)) for label, raw in zip(own, given, strict=True)]
    twice = next((label for label, count in Counter(names).items() if count > 1), None)
    if twice is not None:
        raise ModelError(f"model_labels gives two labels of model {name} the name {_shown(twice)}; give each its own")
    return names


def _usual_activation(config: Mapping[str, Any], count: int) -> Activation | None:
    """The activation by ``problem_type``, as transformers takes it; None for a regression, which has none."""
    problem = config.get("problem_type")
    if problem == "multi_label_classification":
        return "sigmoid"
    return None if problem == "regression" or count == 1 else "softmax"


def _activation(name: str, options: LabelOptions, usual: Activation | None, count: int) -> Activation:
    """The activation by the setting, ``usual`` where that is auto. Raises ModelError for one that makes no sense."""
    activation = usual if options.activation == "auto" else options.activation
    if activation is None:
        raise ModelError(
            f"model {name} cannot be loaded: by its config.json its output is a number (regression) and no label; set "
            "activation to sigmoid if it is the logit of its label"
        )
    if activation == "softmax" and count == 1:
        raise ModelError(
            f"activation softmax gives model {name} always 1, for it has one label; set activation to sigmoid"
        )
    if activation == "softmax" and options.threshold is not None:
        raise ModelError(
            f"threshold goes with activation sigmoid, by which a text may have several labels, and that of model {name} is "
            "softmax; leave threshold out, or set activation to sigmoid"
        )
    return activation


def _weights(name: str, names: Sequence[str], scores: Mapping[str, float] | None) -> tuple[float, ...] | None:
    if scores is None:
        return _usual_weights(names)
    for label, weight in scores.items():
        if not abs(weight) <= MAX_WEIGHT:  # true for NaN, too
            raise ModelError(
                f"label_scores gives {_shown(label)} the weight {weight:g}; it should be from -{MAX_WEIGHT:,} to "
                f"{MAX_WEIGHT:,}"
            )
        if label not in names:
            raise ModelError(
                f"label_scores weighs {_shown(label)}, which model {name} does not have; it has: {listed(names)}"
            )
    return tuple(float(scores.get(label, 0)) for label in names)


def _usual_weights(names: Sequence[str]) -> tuple[float, ...] | None:
    """The card's weights where all labels are among the card's, in any case; else None: nothing is known of them."""
    lower = [label.lower() for label in names]
    return tuple(CARD_WEIGHTS[label] for label in lower) if set(lower) <= set(LABELS) else None


def _weights_text(names: Sequence[str], weights: Sequence[float]) -> str:
    numbers = (repr(weight).removesuffix(".0") for weight in weights)
    return pairs_text(zip(names, numbers, strict=True))


def _unusable(name: str, why: str) -> ModelError:
    return ModelError(f"model {name} cannot be loaded: its labels (id2label in config.json) cannot be used: {why}")


def _shown(label: str) -> str:
    """A label in a message: shortened, and escaped or in quotes where it would not show."""
    short = printable(label[:MAX_CHARS])
    return short if short.strip() else repr(short)


def _default_names(count: int) -> dict[str, str]:
    """The names that transformers gives to labels where config.json has no id2label."""
    return {str(number): f"LABEL_{number}" for number in range(count)}
