"""A repository on the Hugging Face hub, by huggingface_hub alone: its commit, and its files as they are asked for.

The library takes a quarter of a second to import, so each function does that itself: most checkpoints are folders.
The library's log lines go where its logger is told to write; no progress bar is shown, and no setting of it is changed.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from worker.model.checkpoint import Find, HubUnreachable, ModelError
from worker.model.library_errors import as_model_error

TOO_MANY_REQUESTS = 429
SERVER_ERROR = 500  # and above: the hub's own


def open_repository(name: str, revision: str | None) -> tuple[str, Find]:
    """The commit that a branch, tag or commit means now (None: the newest of main), and its files.

    A file is downloaded when it is first asked for, unless the hub's cache has it. Where the hub does not answer, or is
    not to be asked (HF_HUB_OFFLINE), the cache alone says what there is. Blocks for as long as the network takes.

    Raises ModelError, as the ``Find`` does, too; HubUnreachable where the hub does not answer and the cache lacks a file.
    """
    from huggingface_hub import try_to_load_from_cache  # noqa: PLC0415 - slow
    from huggingface_hub.errors import LocalEntryNotFoundError  # noqa: PLC0415

    with _errors(name, revision):
        before = try_to_load_from_cache(name, "config.json", revision=revision)
        config = _download(name, "config.json", revision)
        if config is None:
            raise ModelError(f"model {name} cannot be loaded: the hub has no config.json for it")
    commit = config.parent.name
    answers = True if str(config) != before else None  # whether the hub answers; None while only the cache has

    @cache  # each call may be a request
    def find(file: str) -> Path | None:
        nonlocal answers
        with _errors(name, commit):
            known = try_to_load_from_cache(name, file, revision=commit)
            if known is not None:
                return Path(known) if isinstance(known, str) else None  # else the cache knows that there is none
            if answers is False:  # each try would take half a minute
                return None
            try:
                found = _download(name, file, commit)
            except LocalEntryNotFoundError:  # neither the hub nor the cache says whether there is one
                if answers:
                    raise
                answers = False
                return None
            answers = True
            return found

    return commit, find


def _download(name: str, file: str, revision: str | None) -> Path | None:
    """The place of a file in the cache; None if the repository has no such file.

    Raises LocalEntryNotFoundError where neither the hub nor the cache says whether there is one.
    """
    from huggingface_hub import hf_hub_download  # noqa: PLC0415 - slow
    from huggingface_hub.errors import RemoteEntryNotFoundError  # noqa: PLC0415
    from huggingface_hub.utils.tqdm import silent_tqdm  # noqa: PLC0415

    try:
        return Path(hf_hub_download(name, file, revision=revision, tqdm_class=silent_tqdm))
    except RemoteEntryNotFoundError:
        return None


@contextmanager
def _errors(name: str, revision: str | None) -> Iterator[None]:
    """Raises ModelError, in one sentence, for what the library raises inside."""
    from huggingface_hub import errors, is_offline_mode  # noqa: PLC0415 - slow

    cannot = f"model {name} cannot be loaded"
    with as_model_error(name, "loaded"):
        try:
            yield
        except errors.RevisionNotFoundError as error:
            raise ModelError(f"{cannot}: the hub has no revision {revision} of it") from error
        except errors.GatedRepoError as error:
            raise ModelError(
                f"{cannot}: its owner grants access to it; ask for it on its page on the hub, and set HF_TOKEN"
            ) from error
        except errors.RepositoryNotFoundError as error:
            raise ModelError(
                f"{cannot}: the hub has no such repository, or it is private; for a private one set HF_TOKEN"
            ) from error
        except errors.LocalEntryNotFoundError as error:
            if is_offline_mode():
                raise ModelError(
                    f"{cannot}: the hub's cache does not hold it, and HF_HUB_OFFLINE keeps the hub from being asked"
                ) from error
            raise HubUnreachable(
                f"{cannot}: the Hugging Face hub cannot be reached, and its cache does not hold it; try again, or name a "
                "folder"
            ) from error
        except errors.HfHubHTTPError as error:
            code = error.response.status_code
            kind = HubUnreachable if code == TOO_MANY_REQUESTS or code >= SERVER_ERROR else ModelError
            raise kind(f"{cannot}: the hub answers with HTTP {code}") from error
