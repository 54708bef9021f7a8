"""Finds model folders by path or in the Hugging Face cache. Nothing here imports Paddle."""

from __future__ import annotations

import os
from pathlib import Path

from pypkg.errors import UserError
from pypkg.files.paths import similar_folder

# Weights of other frameworks and formats, which this package does not read.
_NOT_READ = ["*.h5", "*.msgpack", "*.ot", "*.onnx", "*.tflite", "*.gguf", "original/*"]


def find_weights(name_or_folder: str | Path, download: bool = False) -> Path:
    """The folder of a model: the given folder, or the snapshot of branch main in the cache.

    A folder takes precedence over a name. Names in the cache are not case-sensitive.

    Args:
        name_or_folder: a folder, or a name on the Hugging Face Hub such as "bigscience/bloom-560m".
        download: whether to download files that the cache lacks; False: the network is not used.

    Raises:
        UserError: there is no such folder and no such snapshot, or the download failed.
    """
    if os.path.isdir(name_or_folder):  # False, not an error, for a name too long for a path
        return Path(name_or_folder)
    if os.path.isfile(name_or_folder):
        raise UserError(
            f"{str(name_or_folder)!r} is a file; give the folder that holds the weights and "
            f"config.json, which may be {str(Path(name_or_folder).parent)!r}"
        )
    from huggingface_hub import constants, snapshot_download  # takes a second to import

    name, cache = str(name_or_folder), Path(constants.HF_HUB_CACHE)
    try:
        if download:
            return Path(snapshot_download(name, cache_dir=cache, ignore_patterns=_NOT_READ))
        # A snapshot may be incomplete. The readers report missing files.
        return Path(
            snapshot_download(
                _cached_name(name, cache),
                cache_dir=cache,
                local_files_only=True,
                allow_patterns=["config.json"],
            )
        )
    except (OSError, ValueError) as error:
        what = f"could not be downloaded ({error})" if download else "is not downloaded"
        hint = similar_folder(name) or "."
        raise UserError(
            f"{name!r} is neither a folder nor a model in the Hugging Face cache {cache} (branch "
            f"main), and {what}{hint} Give the path of a folder with config.json and the weights, "
            "or download the model on a machine with network access, for example by "
            "`pypkg convert import NAME FOLDER --download`, and set HF_HOME to its cache"
        ) from error


def _cached_name(name: str, cache: Path) -> str:
    """``name`` with the upper and lower case that it has in the cache."""
    wanted = f"models--{name.replace('/', '--')}".lower()
    if cache.is_dir():
        for folder in sorted(cache.iterdir()):
            if folder.name.lower() == wanted:
                return folder.name.removeprefix("models--").replace("--", "/")
    return name
