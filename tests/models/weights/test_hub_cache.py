"""The cache of Hugging Face's tools, never the network."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from model_testing import GOLDEN

from pypkg.errors import UserError
from pypkg.models import from_pretrained
from pypkg.models.weights.hub_cache import cache_folder, find_weights

COMMIT, OLDER = "9f" * 20, "01" * 20
VARIABLES = ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for variable in VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    return tmp_path / "hub"


def _download(cache: Path, name: str, commit: str = COMMIT, branch: str | None = "main") -> Path:
    """As huggingface_hub leaves it: files are links to blobs."""
    repository = cache / f"models--{name.replace('/', '--')}"
    snapshot = repository / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir(exist_ok=True)
    for file in ("config.json", "model.safetensors"):
        blob = repository / "blobs" / f"{commit[:4]}{file}"
        shutil.copyfile(GOLDEN / "llama" / file, blob)
        (snapshot / file).symlink_to(Path("../../blobs") / blob.name)
    if branch:
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / branch).write_text(commit)
    return snapshot


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"HF_HUB_CACHE": "/a", "HF_HOME": "/b"}, "/a"),
        ({"HUGGINGFACE_HUB_CACHE": "/a", "HF_HOME": "/b"}, "/a"),
        ({"HF_HOME": "/b", "XDG_CACHE_HOME": "/c"}, "/b/hub"),
        ({"XDG_CACHE_HOME": "/c"}, "/c/huggingface/hub"),
        ({"HF_HOME": "~/b", "HOME": "/me"}, "/me/b/hub"),
        ({"HOME": "/me"}, "/me/.cache/huggingface/hub"),
    ],
)
def test_where_the_cache_is(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], expected: str
) -> None:
    for variable in VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    for variable, value in variables.items():
        monkeypatch.setenv(variable, value)
    assert cache_folder() == Path(expected)


@pytest.mark.parametrize("name", ["org/tiny.model-1", "gpt2"])
def test_a_downloaded_model_loads(cache: Path, name: str) -> None:
    snapshot = _download(cache, name)
    assert find_weights(name) == snapshot
    model = from_pretrained(name)
    assert model.config.hidden_size == 64


def test_the_case_of_a_name_does_not_matter(cache: Path) -> None:
    snapshot = _download(cache, "Qwen/Qwen-7B")
    assert find_weights("qwen/qwen-7b") == snapshot


def test_main_wins_over_other_commits(cache: Path) -> None:
    _download(cache, "org/m", OLDER, branch="v1")
    snapshot = _download(cache, "org/m")
    assert find_weights("org/m") == snapshot


def test_without_main_the_only_download(cache: Path) -> None:
    only = _download(cache, "org/m", OLDER, branch=None)
    assert find_weights("org/m") == only
    _download(cache, "org/m", branch=None)
    with pytest.raises(UserError, match=f"holds 2 downloads, .*{OLDER}, {COMMIT}"):
        find_weights("org/m")


def test_a_folder_wins(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _download(cache, "org/m")
    (tmp_path / "org" / "m").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert find_weights("org/m") == Path("org/m")


def test_neither_folder_nor_download(cache: Path) -> None:
    message = r"'org/m' is neither a folder nor a model in the Hugging Face cache {}\. Nothing is "
    for _ in range(2):
        with pytest.raises(UserError, match=message.format(cache) + "downloaded: give the path"):
            from_pretrained("org/m")
        cache.mkdir(exist_ok=True)
    with pytest.raises(UserError, match="neither a folder nor a model"):
        find_weights("some/where/else")


def test_an_incomplete_download(cache: Path) -> None:
    snapshot = _download(cache, "org/m")
    shutil.rmtree(snapshot)
    with pytest.raises(UserError, match=rf"lacks commit {COMMIT}, which .*refs/main names"):
        find_weights("org/m")
    shutil.rmtree(snapshot.parent)
    with pytest.raises(UserError, match="is not a complete download"):
        find_weights("org/m")
