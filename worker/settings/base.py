"""What the settings of every command share: how pydantic reads them, and what no value may be."""

import re
import unicodedata
from pathlib import Path
from typing import Any, TypeGuard, get_args
from urllib.parse import quote, unquote

from pydantic import Field, ValidationInfo, field_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

PREFIX = "WORKER_"
SECRETS = (
    "http_token",
    "oauth_client_secret",
    "sasl_password",
    "schema_registry_password",
    "schema_registry_token",
    "ssl_key_password",
)
POSITIONAL = ("texts", "record")  # settings that are words behind the command, without a flag
QUOTED = "quoted:"
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")


class Settings(BaseSettings):
    """What every command's settings share: where values come from."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX,
        extra="forbid",
        allow_inf_nan=False,
        frozen=True,
        protected_namespaces=(),
        case_sensitive=True,  # else flags are taken in any case, and cut at a line end
        cli_kebab_case=True,
        cli_implicit_flags=True,
        cli_hide_none_type=True,
        cli_exit_on_error=False,
        cli_parse_none_str="–",
    )

    config: Path | None = Field(None, description="TOML file of settings, by the names below with underscores")

    @field_validator("*", mode="before")
    @classmethod
    def _is_plain(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuses empty words and control characters in all settings, and invisible characters in names and paths.

        Texts to score, patterns, the words of lists and secrets may have invisible characters, for others made them.
        """
        name, annotation = str(info.field_name), cls.model_fields[str(info.field_name)].annotation
        fault = None if name == "texts" else common_fault(value)
        if not fault and isinstance(value, str) and name != "input_pattern" and _takes(annotation, str, Path):
            fault = invisible_fault(value)
        if fault:
            raise ValueError(fault)
        if isinstance(value, bool) and _takes(annotation, int, float):
            return str(value).lower()  # a text is refused with a sentence; true itself pydantic would take for 1
        return value

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Flags come first by themselves; ``load`` passes all other values as arguments."""
        return (init_settings,)


def common_fault(value: object) -> str | None:
    """Why no setting at all can have this value: an empty word or a control character in it. None if one can."""
    words = unquoted(value) if is_list_of_words(value) else [value] if isinstance(value, str) else []
    for word in words:
        if not word:
            return "it should not be empty"
        control = CONTROL.search(word)
        if control and word.endswith("\r"):
            return "it should not end with a carriage return (CR), as the lines of a Windows text file do"
        if control:
            return f"it should have no control characters, and character {control.start() + 1} is {control[0]!a}"
    return None


def invisible_fault(name: str) -> str | None:
    """Which character of a name or path does not show, so that it is not what it looks like. None if all show."""
    if name != name.strip():
        white = name[0] if name[0].isspace() else name[-1]
        return f"it should not {'begin' if name[0].isspace() else 'end'} with white space, and this is {white!a}"
    unseen = next(((at, each) for at, each in enumerate(name, 1) if unicodedata.category(each) == "Cf"), None)
    return f"it should have no invisible characters, and character {unseen[0]} is {unseen[1]!a}" if unseen else None


def takes_list(kind: type[Settings], name: str) -> bool:
    """Whether the setting is a list of words, and not one word."""
    return name in kind.model_fields and kind.model_fields[name].annotation == list[str]


def _takes(annotation: object, *kinds: type) -> bool:
    return annotation in kinds or any(_takes(each, *kinds) for each in get_args(annotation))


def quoted(word: str) -> str:
    """The word of a list as pydantic-settings leaves it whole, which would split it at commas and quotes."""
    return QUOTED + quote(word, safe="", errors="surrogatepass")


def unquoted(words: list[str]) -> list[str]:
    """The words as they were before ``quoted``; those that did not go through it stay as they are."""
    return [
        unquote(each.removeprefix(QUOTED), errors="surrogatepass") if each.startswith(QUOTED) else each
        for each in words
    ]


def is_list_of_words(value: object) -> TypeGuard[list[str]]:
    return isinstance(value, list) and all(isinstance(word, str) for word in value)
