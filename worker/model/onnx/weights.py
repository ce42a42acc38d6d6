"""The weights that an architecture needs, and where a checkpoint's file has them."""

from collections.abc import Mapping
from typing import Final, Protocol, TypeVar

from worker.model.checkpoint import ModelError
from worker.model.onnx.architecture import Architecture

OLD_ENDINGS: Final = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}


class _Shaped(Protocol):
    @property
    def shape(self) -> tuple[int, ...]: ...


Array = TypeVar("Array", bound=_Shaped)


def weight_shapes(architecture: Architecture) -> dict[str, tuple[int, ...]]:
    """The names and shapes of the weights that a checkpoint must hold, as transformers names them."""
    width, prefix = architecture.hidden, architecture.prefix
    shapes: dict[str, tuple[int, ...]] = {
        f"{prefix}.embeddings.word_embeddings.weight": (architecture.vocabulary, width),
        f"{prefix}.embeddings.position_embeddings.weight": (architecture.positions, width),
        f"{prefix}.embeddings.token_type_embeddings.weight": (architecture.token_types, width),
        **_norm(f"{prefix}.embeddings.LayerNorm", width),
    }
    for number in range(architecture.layers):
        shapes |= _layer(f"{prefix}.encoder.layer.{number}", width, architecture.intermediate)
    inner, outer = architecture.head
    return shapes | _linear(inner, width, width) | _linear(outer, width, architecture.labels)


def weights_of(name: str, architecture: Architecture, file: Mapping[str, Array]) -> dict[str, Array]:
    """The weights that ``weight_shapes`` names, out of all that a checkpoint's files hold.

    As in transformers, a name may lack the encoder's prefix or have it where it does not belong, layer norms may be called
    gamma and beta, and what is not needed is left out. ``name``: of the model, for messages. Raises ModelError if a weight
    is missing, or has another size than config.json states.
    """
    shapes = weight_shapes(architecture)
    found = {_name_in(shapes, architecture.prefix, name): weight for name, weight in file.items()}
    missing = sorted(shapes.keys() - found.keys())
    if missing:
        raise ModelError(
            f"model {name} is no finished classifier: its file lacks {len(missing)} weights ({missing[0]}, …), which would "
            "be random"
        )
    for weight, shape in shapes.items():
        if tuple(found[weight].shape) != shape:
            raise ModelError(
                f"model {name} cannot be loaded: its weights have other sizes than its config.json states ({weight} is of "
                f"{_size(found[weight].shape)} numbers, and should be of {_size(shape)})"
            )
    return {weight: found[weight] for weight in shapes}


def _name_in(shapes: Mapping[str, object], prefix: str, name: str) -> str:
    for old, new in OLD_ENDINGS.items():
        name = name.replace(old, new)
    candidates = (name.removeprefix(f"{prefix}."), f"{prefix}.{name}")
    return next((candidate for candidate in candidates if candidate in shapes), name)


def _layer(name: str, width: int, intermediate: int) -> dict[str, tuple[int, ...]]:
    attention = f"{name}.attention"
    return {
        **_linear(f"{attention}.self.query", width, width),
        **_linear(f"{attention}.self.key", width, width),
        **_linear(f"{attention}.self.value", width, width),
        **_linear(f"{attention}.output.dense", width, width),
        **_norm(f"{attention}.output.LayerNorm", width),
        **_linear(f"{name}.intermediate.dense", width, intermediate),
        **_linear(f"{name}.output.dense", intermediate, width),
        **_norm(f"{name}.output.LayerNorm", width),
    }


def _linear(name: str, inputs: int, outputs: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def _norm(name: str, width: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def _size(shape: tuple[int, ...]) -> str:
    return " × ".join(map(str, shape)) or "1"
