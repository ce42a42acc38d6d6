"""A repository on the hub: one commit, only the files that are asked for, and a sentence for whatever goes wrong."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub.utils.tqdm import progress_bar_states

from tests.support.hub import REPOSITORY, Hub, serving
from tests.support.process import environment
from worker.model.checkpoint import HubUnreachable, ModelError
from worker.model.hub import open_repository

COMMIT, NEWER = "0123456789abcdef0123456789abcdef01234567", "f" * 40
FILES = {"config.json": b"{}", "tokenizer.json": b'{"model": {}}', "model.safetensors": b"x" * 100_000}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    return tmp_path


def ask_at(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    template = f"{address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)  # between tries


@pytest.fixture
def hub(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    hub = Hub(dict(FILES), COMMIT)
    with serving(hub) as address:
        ask_at(monkeypatch, address)
        yield hub


def leave(monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    """From here on no hub answers, or it is not to be asked."""
    if how == "offline":
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    else:
        ask_at(monkeypatch, "http://127.0.0.1:1")


def test_files_are_of_the_newest_commit_and_downloaded_when_asked_for(
    hub: Hub, capfd: pytest.CaptureFixture[str]
) -> None:
    bars = dict(progress_bar_states)
    commit, find = open_repository(REPOSITORY, None)
    assert commit == COMMIT
    hub.revisions["main"] = NEWER  # published meanwhile
    file = find("model.safetensors")
    assert file is not None
    assert file.read_bytes() == FILES["model.safetensors"]
    assert find("vocab.txt") is None
    assert ("GET", "tokenizer.json") not in hub.requests
    assert capfd.readouterr() == ("", "")
    assert progress_bar_states == bars


def test_what_is_known_of_a_commit_is_not_asked_for_again(hub: Hub) -> None:
    _, find = open_repository(REPOSITORY, "main")
    found = [find("tokenizer.json"), find("vocab.txt")]
    commit, find = open_repository(REPOSITORY, COMMIT)
    hub.requests.clear()
    assert [find("tokenizer.json"), find("vocab.txt")] == found
    assert commit == COMMIT
    assert hub.requests == []


def test_a_branch_is_asked_for_at_each_start(hub: Hub) -> None:
    assert open_repository(REPOSITORY, None)[0] == COMMIT
    hub.revisions |= {"main": NEWER, NEWER: NEWER}
    assert open_repository(REPOSITORY, None)[0] == NEWER
    assert open_repository(REPOSITORY, COMMIT)[0] == COMMIT


@pytest.mark.parametrize("how", ["offline", "unreachable"])
@pytest.mark.parametrize("revision", [None, "main", COMMIT])
def test_the_cache_takes_the_place_of_a_hub_that_does_not_answer(
    hub: Hub, revision: str | None, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, find = open_repository(REPOSITORY, revision)
    file = find("tokenizer.json")
    leave(monkeypatch, how)
    commit, find = open_repository(REPOSITORY, revision)
    assert (commit, find("tokenizer.json")) == (COMMIT, file)
    assert find("model.safetensors") is None  # which the cache does not have
    assert find("vocab.txt") is None


@pytest.mark.parametrize(("how", "kind"), [("offline", ModelError), ("unreachable", HubUnreachable)])
def test_neither_hub_nor_cache(cache: Path, how: str, kind: type[ModelError], monkeypatch: pytest.MonkeyPatch) -> None:
    leave(monkeypatch, how)
    with pytest.raises(ModelError, match=r"^model org/name cannot be loaded: .*cache does not hold it") as refusal:
        open_repository(REPOSITORY, None)
    assert type(refusal.value) is kind
    assert refusal.value.exit_code == (1 if kind is HubUnreachable else 2)


def test_a_hub_that_falls_silent_between_two_files_is_no_missing_file(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, find = open_repository(REPOSITORY, None)
    leave(monkeypatch, "unreachable")
    with pytest.raises(HubUnreachable):
        find("tokenizer.json")


@pytest.mark.parametrize(
    ("status", "code", "exit_code", "words"),
    [
        (401, "RepoNotFound", 2, "no such repository, or it is private"),
        (404, "RepoNotFound", 2, "no such repository, or it is private"),
        (404, "RevisionNotFound", 2, "the hub has no revision v2 of it"),
        (404, "EntryNotFound", 2, r"the hub has no config\.json for it"),
        (403, "GatedRepo", 2, "ask for it on its page on the hub, and set HF_TOKEN"),
        (429, "", 1, "cannot be reached"),
        (503, "", 1, "cannot be reached"),
    ],
)
def test_what_the_hub_refuses(hub: Hub, status: int, code: str, exit_code: int, words: str) -> None:
    hub.refusals["*"] = status, code
    with pytest.raises(ModelError, match=words) as refusal:
        open_repository(REPOSITORY, "v2")
    assert refusal.value.exit_code == exit_code


def test_a_name_that_no_repository_can_have(hub: Hub) -> None:
    with pytest.raises(ModelError, match=r"^model a b cannot be loaded: ") as refusal:
        open_repository("a b", None)
    assert refusal.value.exit_code == 2
    assert hub.requests == []


def test_the_library_is_imported_only_where_it_is_used() -> None:
    program = (
        "import sys, worker.model.hub; print([name for name in sys.modules if name.startswith('huggingface_hub')])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, env=environment(), check=True, timeout=150
    )
    assert done.stdout == b"[]\n"
