"""The files of a checkpoint: where they are, whether they can be used, and the revision that results name. Needs no torch.

Every function here that opens a file blocks.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path, PurePosixPath
from typing import Any, Final, NoReturn

import orjson

from worker.errors import UserError
from worker.settings.values import is_folder, revision_fault

BUILTIN: Final = Path(__file__).parent / "builtin"
WEIGHTS: Final = (  # in the order in which transformers looks for them
    "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json",
)  # fmt: skip
READ: Final = (".json", ".txt", ".model", ".codes", ".spm", ".tokenizer")  # endings of configurations and tokenizers
COUNTS: Final = ("hidden_size", "num_attention_heads", "intermediate_size", "vocab_size")
MAX_COUNTS: Final = {  # so many parts are built before a weight is looked at: more would take hours, or all memory
    "num_labels": 100_000,
    **dict.fromkeys(
        (
            "num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers",
            "num_hidden_groups", "inner_group_num",
        ),
        1_000,
    ),
}  # fmt: skip
TORCH_COMMAND: Final = "pip install 'sentiment-worker[torch]'"
MAX_CHARS: Final = 300  # of the words of a checkpoint or a library, in a message
LFS: Final = b"version https://git-lfs.github.com/spec/"

Find = Callable[[str], Path | None]
"""A file of a checkpoint by its name; None where the checkpoint has none. Blocks: it may be downloaded."""


class ModelError(UserError):
    """A checkpoint cannot be used."""


class NeedsTorch(ModelError):
    """A checkpoint, or a setting for it, that needs torch and transformers, which are not installed.

    ``why``: the reason alone. ``instead``: what else would do."""

    def __init__(self, name: str, why: str, instead: str = "") -> None:
        choice = f", or {instead}" if instead else ""
        super().__init__(f"model {name} cannot be loaded without torch: {why}; {TORCH_COMMAND} installs it{choice}")
        self.why = why


class HubUnreachable(ModelError):
    """The hub does not answer; the next start may succeed."""

    exit_code = 1


def folder_of(name: str, revision: str | None) -> Path | None:
    """The folder that a model's name means; None for a name on the hub.

    Raises ModelError if the folder is missing, if the name could mean a folder or the hub, or if a ``revision`` is given
    for a model that is not on the hub.
    """
    fault = revision_fault(name, revision)
    if fault:
        raise ModelError(fault)
    if name == "builtin":
        return BUILTIN
    folder = Path(os.path.expanduser(name)).absolute()  # noqa: PTH111 - pathlib's raises where there is no home
    if is_folder(name) and folder.is_dir():
        return folder
    if is_folder(name) or (not folder.exists() and (name.startswith(".") or name.count("/") > 1)):
        raise ModelError(
            f"model is {name}, but there is no such folder; it should be one with a checkpoint, or a hub name"
        )
    if folder.exists():
        raise ModelError(
            f"model is {name}, a name on the hub, and there is a folder of that name here, too; write ./{name} if that is "
            "meant, or start in another folder if the hub is"
        )
    return None


def find_in(folder: Path) -> Find:
    """A ``Find`` over the files of a folder."""
    return lambda name: folder / name if (folder / name).is_file() else None


class Checkpoint:
    """The files of one checkpoint.

    ``name``: as it was given. ``commit``: of the hub; None for a folder. ``config``: the object in config.json.
    """

    def __init__(self, name: str, find: Find, commit: str | None = None) -> None:
        """Reads and checks the files. Raises ModelError if one is missing or wrong."""
        self.name = name
        self.commit = commit
        self._find = find
        self._versions: dict[Path, tuple[int, ...]] = {}
        self.config = self._object("config.json") or self._refuse(
            "it has no config.json that names its model_type; it should be a folder with a checkpoint"
        )
        self._refuse_wrong_config()
        self._refuse_wrong_tokenizer()
        self.weights = self._weights()
        """Names of the files with the weights, and of their index."""

    def find(self, name: str) -> Path | None:
        """A file by its name; None where there is none. Blocks: it may be downloaded. Raises ModelError."""
        file = self._find(name)
        if file is not None:
            self._versions.setdefault(file, _version(file))
        return file

    def identity(self) -> str:
        """The hub's commit; for a folder the first 12 hex digits of a SHA-256. Blocks: it reads the files.

        It is the hash of what ``sha256sum`` prints for the files that are read, sorted by name. Raises ModelError if a
        file that was found before has been written since: what was loaded may then be something else.
        """
        config = self.find("config.json")
        if self.commit or config is None:
            return str(self.commit)
        folder = config.parent
        others = (file.name for file in folder.iterdir() if file.suffix in READ and file.is_file())
        names = {*self.weights, *(name for name in others if not name.startswith("."))}
        lines = "".join(f"{_sha256(folder / name)}  {name}\n" for name in sorted(names))
        for file, version in self._versions.items():
            if _version(file) != version:
                self._refuse(f"{_shown(file.name)} was written while it was read; load it again")
        return hashlib.sha256(lines.encode(errors="surrogateescape")).hexdigest()[:12]

    def _weights(self) -> list[str]:
        """The files that transformers reads. Raises ModelError if one is outside the checkpoint's folder."""
        chosen = self.config.get("transformers_weights")
        first = chosen or next((name for name in WEIGHTS if self.find(name)), None)
        if first is None:
            self._refuse(f"it has none of {', '.join(WEIGHTS)}")
        self._refuse_outside("config.json", [first])
        if not first.endswith(".index.json"):
            self._refuse_unreadable(first)
            return [first]
        shards = (self._object(first) or {}).get("weight_map")
        if not isinstance(shards, dict) or not shards:
            self._refuse(f"{first} has no weight_map that names its files")
        self._refuse_outside(first, shards.values())
        for shard in sorted(set(shards.values())):
            self._refuse_unreadable(shard)
        return sorted({first, *shards.values()})

    def _refuse_wrong_config(self) -> None:
        for field in (*COUNTS, *MAX_COUNTS):
            self._refuse_wrong_count("config.json", self.config, field)
        for field, most in MAX_COUNTS.items():
            if (self.config.get(field) or 0) > most:
                self._refuse(f"{field} in config.json is {_shown(self.config[field])}; it should be {most:,} at most")
        if self.config.get("max_position_embeddings") != -1:  # which says that there is no maximum
            self._refuse_wrong_count("config.json", self.config, "max_position_embeddings")
        padding, rows = self.config.get("pad_token_id"), self.config.get("vocab_size")
        if type(padding) is int and type(rows) is int and padding >= rows:
            self._refuse(f"pad_token_id in config.json is {padding}, and vocab_size {rows}; it should be one of them")
        labels = self.config.get("id2label")
        if labels is None:
            return
        if not isinstance(labels, dict) or not all(isinstance(label, str) for label in labels.values()):
            self._refuse("id2label in config.json should give each number a label's name")
        if not all(number.removeprefix("-").isdecimal() for number in labels):
            self._refuse('id2label in config.json should have numbers before its names, as in {"0": "negative"}')
        if self.config.get("num_labels", len(labels)) != len(labels):
            self._refuse(f"num_labels and id2label in config.json do not agree: id2label has {len(labels)} names")

    def _refuse_wrong_tokenizer(self) -> None:
        config = self._object("tokenizer_config.json") or {}
        if isinstance(config.get("model_max_length"), float) and config["model_max_length"].is_integer():
            # 512.0 is fine, and 1e30 says that there is none.
            config["model_max_length"] = int(config["model_max_length"])
        self._refuse_wrong_count("tokenizer_config.json", config, "model_max_length")
        if config.get("fast_tokenizer_files") is not None:
            self._refuse_outside("tokenizer_config.json", config["fast_tokenizer_files"])
        file = self.find("tokenizer.json")
        if file is None:
            return
        self._refuse_unreadable("tokenizer.json")
        try:
            value = orjson.loads(file.read_bytes())
        except orjson.JSONDecodeError as error:
            self._refuse_broken("tokenizer.json", error.msg)
        if not isinstance(value, dict) or not isinstance(value.get("model"), dict):
            self._refuse("tokenizer.json should be an object with a model, as the tokenizers library saves it")

    def _refuse_wrong_count(self, file: str, config: dict[str, Any], field: str) -> None:
        value = config.get(field)
        if value is not None and (type(value) is not int or value < 1):
            self._refuse(f"{field} in {file} is {_shown(value)}; it should be a whole number, 1 or more")

    def _refuse_outside(self, file: str, names: Iterable[Any]) -> None:
        """Checks names, and not where links lead: in the hub's cache, all files are links to elsewhere."""
        for name in names if isinstance(names, Iterable) else [names]:
            path = PurePosixPath(name) if isinstance(name, str) else None
            if not path or path.is_absolute() or ".." in path.parts or not path.name:
                self._refuse(f"{file} names {_shown(name)}, and only files of its own folder are read")

    def _object(self, name: str) -> dict[str, Any] | None:
        """The object in a JSON file; None if there is no such file. Raises ModelError if it is no object."""
        file = self.find(name)
        if file is None:
            return None
        self._refuse_unreadable(name)
        try:
            value = json.loads(file.read_bytes())
        except (ValueError, RecursionError) as error:
            self._refuse_broken(name, str(error).splitlines()[0])
        return value if isinstance(value, dict) else self._refuse(f"{name} is JSON, and no object")

    def _refuse_unreadable(self, name: str) -> None:
        file = self.find(name)
        if file is None:
            self._refuse(f"its file {_shown(name)} is not there; copy or download it again")
        try:
            with file.open("rb") as begun:
                is_pointer = begun.read(len(LFS)) == LFS
        except OSError as error:
            self._refuse(f"{name} cannot be read ({error.strerror})")
        if is_pointer:
            self._refuse(f"{name} is a pointer of Git LFS and not the file; run `git lfs pull` where it was cloned")

    def _refuse_broken(self, name: str, why: str) -> NoReturn:
        self._refuse(f"{name} is no valid JSON ({why}); if it was cut short, copy or download it again")

    def _refuse(self, why: str) -> NoReturn:
        raise ModelError(f"model {self.name} cannot be loaded: {why}")


def _shown(value: object) -> str:
    return ascii(value)[:100]


def _version(file: Path) -> tuple[int, ...]:
    """What changes when a file is written or replaced. A container's file system may change a file's number by itself."""
    found = file.stat()
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
