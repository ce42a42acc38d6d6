"""Where values come from: flags go before the environment, which goes before the TOML file."""

import os
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError
from pydantic_settings import SettingsError

from worker.errors import WrongSetting
from worker.printable import printable
from worker.settings.base import PREFIX, SECRETS, Settings, common_fault, invisible_fault, takes_list
from worker.settings.command_line import arguments_for_argparse
from worker.settings.run import RunSettings
from worker.settings.sentences import secret_sentence, sentences, suggestion, variable_of
from worker.settings.shared import EventSettings

AnySettings = TypeVar("AnySettings", bound=Settings)


def load(
    kind: type[AnySettings], argv: Sequence[str], prog: str, environ: Mapping[str, str] = os.environ
) -> AnySettings:
    """Settings of one kind from flags, environment and file. A variable that is empty sets nothing, unless it is a secret.

    Raises WrongSetting with one sentence. ``--help`` prints and raises SystemExit(0). Reads the file; does not block
    otherwise.
    """
    arguments = arguments_for_argparse(kind, argv, prog)
    values: dict[str, Any] = {"_cli_parse_args": arguments, "_cli_prog_name": prog}
    if not {"-h", "--help"} & set(arguments):
        values |= _file_values(kind, _config_path(arguments, environ))
        values |= _variable_values(kind, environ) | _secret_values(kind, environ)
    try:
        return kind(**values)
    except ValidationError as error:
        raise WrongSetting(*sentences(kind, error.errors())) from None
    except SettingsError:
        raise WrongSetting(f"the command line cannot be read; `{prog} --help` lists the flags") from None


def unknown_variables(kind: type[Settings], environ: Mapping[str, str] = os.environ) -> list[str]:
    """A sentence for each ``WORKER_…`` variable that sets nothing: a warning, for Kubernetes injects some of its own.

    What sets something of a worker is known to all commands: they may share its environment.
    """
    names = {*kind.model_fields, *RunSettings.model_fields, *(f"{name}_file" for name in SECRETS)}
    known = {PREFIX + name.upper() for name in names}
    unknown = sorted(name for name in environ if name.startswith(PREFIX) and name not in known)
    return [f"the variable {printable(name)} sets nothing{suggestion(name, names, variable_of)}" for name in unknown]


def _config_path(arguments: Sequence[str], environ: Mapping[str, str]) -> Path | None:
    """The last flag's, as of the other settings, else the variable's. Raises WrongSetting."""
    given = [word.removeprefix("--config=") for word in arguments if word.startswith("--config=")]
    path = given[-1] if given else environ.get(variable_of("config")) or None
    if path is None:
        return None
    if fault := common_fault(path) or invisible_fault(path):
        raise WrongSetting(f"config = {path!r} is wrong: {fault}")
    return Path(path)


def _file_values(kind: type[Settings], path: Path | None) -> dict[str, Any]:
    if path is None:
        return {}
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise WrongSetting(f"config: {path} cannot be read ({error.strerror}); it should be a TOML file") from None
    except UnicodeDecodeError:
        raise WrongSetting(f"config: {path} is not in UTF-8, as TOML has to be; save it in that encoding") from None
    except tomllib.TOMLDecodeError as error:
        raise WrongSetting(f"config: {path} is not valid TOML: {error}") from None
    if issubclass(kind, EventSettings):  # one file for the worker and its replays
        others = RunSettings.model_fields.keys() - kind.model_fields.keys() - set(SECRETS)
        values = {name: value for name, value in values.items() if name not in others}
    for name, value in values.items():
        if name in SECRETS:
            raise WrongSetting(f"config: {secret_sentence(name)}")
        if name not in kind.model_fields or name == "config":
            raise WrongSetting(f"config: {path} sets {name}, which is no setting; {_hint(kind, name, value)}")
    return {
        name: ",".join(map(str, value)) if isinstance(value, list) and not takes_list(kind, name) else value
        for name, value in values.items()
    }


def _hint(kind: type[Settings], name: str, value: object) -> str:
    if isinstance(value, dict):
        return "settings stand at the top of the file, in no table"
    perhaps = suggestion(name, kind.model_fields.keys() - {"config"}, str).removeprefix("; ")
    return perhaps or "`sentiment-worker run --help` lists them"


def _variable_values(kind: type[Settings], environ: Mapping[str, str]) -> dict[str, Any]:
    given = {name: environ.get(variable_of(name)) for name in kind.model_fields}
    given = {name: value for name, value in given.items() if value or (value == "" and name in SECRETS)}
    return {name: [value] if takes_list(kind, name) else value for name, value in given.items()}


def _secret_values(kind: type[Settings], environ: Mapping[str, str]) -> dict[str, str]:
    values = {}
    for name in SECRETS:
        variable = variable_of(name)
        path = environ.get(variable + "_FILE")
        if path is None or name not in kind.model_fields:
            continue
        if variable in environ:
            raise WrongSetting(f"{variable} and {variable}_FILE are both set; set one of them")
        if fault := common_fault(path) or invisible_fault(path):
            raise WrongSetting(f"{variable}_FILE = {path!r} is wrong: {fault}")
        values[name] = _secret(name, Path(path))
    return values


def secret_file(name: str, environ: Mapping[str, str] = os.environ) -> Path | None:
    """The file that holds a secret; None where it is in its variable, or not set."""
    path = environ.get(variable_of(name) + "_FILE")
    return None if path is None else Path(path)


def secret_in(kind: type[Settings], name: str, file: Path) -> str:
    """The secret that a file has now, for the setting ``name`` of ``kind``. Raises WrongSetting where it cannot be that."""
    value = _secret(name, file)
    if fault := common_fault(value):
        raise WrongSetting(f"{variable_of(name)}_FILE: what {file} holds is wrong: {fault}")
    try:
        adapter: TypeAdapter[Any] = TypeAdapter(kind.model_fields[name].annotation)  # type: ignore[arg-type]
        adapter.validate_python(value)
    except ValidationError as error:
        faults: list[Any] = [{**each, "loc": (name,)} for each in error.errors()]
        raise WrongSetting(*sentences(kind, faults)) from None
    return value


def _secret(name: str, file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig").rstrip("\r\n")
    except (OSError, UnicodeDecodeError):
        raise WrongSetting(
            f"{variable_of(name)}_FILE: {file} cannot be read; it should be a file with the secret"
        ) from None
