"""Archives as ``torch.save`` writes them, and such as it never would."""

import io
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

SIX = bytes(24)  # numbers in float32
HOOKS: OrderedDict[str, Any] = OrderedDict()


class Storage(NamedTuple):
    """What stands in a pickle for a storage."""

    type: Any = torch.FloatStorage
    key: Any = "0"
    length: Any = 6
    location: Any = "cpu"


class Tensor:
    """A tensor that says of itself what it likes."""

    def __init__(self, storage: Any = None, offset: Any = 0, shape: Any = (2, 3), strides: Any = (3, 1)) -> None:
        self._arguments = (storage or Storage(), offset, shape, strides, False, HOOKS)

    def __reduce__(self) -> tuple[Any, ...]:
        return torch._utils._rebuild_tensor_v2, self._arguments  # type: ignore[attr-defined]


class _Pickler(pickle.Pickler):
    def persistent_id(self, value: Any) -> tuple[Any, ...] | None:
        return ("storage", value.type, value.key, value.location, value.length) if isinstance(value, Storage) else None


def pickled(value: Any, protocol: int = 2) -> bytes:
    """The pickle of a value in which ``Tensor`` stands for a tensor."""
    file = io.BytesIO()
    _Pickler(file, protocol).dump(value)
    return file.getvalue()


def opcodes(*parts: bytes) -> bytes:
    """A pickle of these opcodes."""
    return b"\x80\x02" + b"".join(parts) + b"."


def write_archive(path: Path, data: bytes, records: Mapping[str, bytes] | None = None, **options: Any) -> Path:
    """An archive with this pickle and these further records; ``options`` are of ``zipfile.ZipFile``."""
    with zipfile.ZipFile(path, "w", **options) as archive:
        for name, content in {"data.pkl": data, "byteorder": b"little", "data/0": SIX, **(records or {})}.items():
            archive.writestr(f"archive/{name}", content)
    return path
