"""Models in the Hugging Face cache; the network only on purpose."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from model_testing import GOLDEN

from pypkg.errors import UserError
from pypkg.models import from_pretrained
from pypkg.models.weights.hub import find_weights

COMMIT, OLDER = "9f" * 20, "01" * 20


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # even by mistake
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


def test_a_file_is_told_its_folder(cache: Path, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"")
    with pytest.raises(UserError, match=f"is a file; give the folder .* {str(tmp_path)!r}"):
        find_weights(file)


def test_a_folder_wins(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _download(cache, "org/m")
    (tmp_path / "org" / "m").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert find_weights("org/m") == Path("org/m")


def test_neither_folder_nor_download(cache: Path) -> None:
    message = (
        rf"'org/m' is neither a folder nor a model in the Hugging Face cache {cache} .* is not"
    )
    for _ in range(2):
        with pytest.raises(UserError, match=message + " downloaded. Give the path .* HF_HOME"):
            from_pretrained("org/m")
        cache.mkdir(exist_ok=True)
    with pytest.raises(UserError, match="neither a folder nor a model"):
        find_weights("some/where/else")


def test_a_folder_with_a_similar_name_is_told(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoint.txt").touch()  # no folder
    wrong, right = tmp_path / "checkpoint", tmp_path / "checkpoints"
    with pytest.raises(UserError, match=rf"downloaded; did you mean '{right}'\? Give the path"):
        find_weights(wrong)
    with pytest.raises(UserError, match=r"is not downloaded\. Give the path"):
        find_weights(tmp_path / "models")


def test_an_incomplete_download(cache: Path) -> None:
    snapshot = _download(cache, "org/m")
    (snapshot / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"has none of model\.safetensors"):
        from_pretrained("org/m")
    shutil.rmtree(snapshot)
    with pytest.raises(UserError, match="'org/m' is neither a folder nor a model"):
        find_weights("org/m")


def test_download_on_purpose(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fetched = []

    def snapshot_download(name: str, **options: object) -> str:
        fetched.append(name)
        assert options["cache_dir"] == cache and not options.get("local_files_only")
        return str(_download(cache, name))

    with pytest.raises(UserError, match=r"'org/m' .* could not be downloaded \("):
        find_weights("org/m", download=True)
    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert from_pretrained("org/m", download=True).config.hidden_size == 64
    assert fetched == ["org/m"]
