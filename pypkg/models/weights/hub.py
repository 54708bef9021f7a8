"""Folders of models, by path or by name in the Hugging Face cache. Nothing here imports Paddle."""

from __future__ import annotations

from pathlib import Path

from pypkg.errors import UserError

# Weights of other frameworks and formats, which nothing here reads.
_NOT_READ = ["*.h5", "*.msgpack", "*.ot", "*.onnx", "*.tflite", "*.gguf", "original/*"]


def find_weights(name_or_folder: str | Path, download: bool = False) -> Path:
    """The folder of a model: the one given, or the snapshot of branch main in the cache.

    A folder wins over a name. In the cache, the case of a name does not matter.

    Args:
        name_or_folder: a folder, or a name on the Hugging Face Hub such as "bigscience/bloom-560m".
        download: fetch what the cache lacks from the Hub. Otherwise the network is never used.

    Raises:
        UserError: there is neither such a folder nor such a snapshot; the message names the cache.
    """
    if Path(name_or_folder).is_dir():
        return Path(name_or_folder)
    from huggingface_hub import constants, snapshot_download  # takes a second to import

    name, cache = str(name_or_folder), Path(constants.HF_HUB_CACHE)
    try:
        if download:
            return Path(snapshot_download(name, cache_dir=cache, ignore_patterns=_NOT_READ))
        # The library may know of more files than were wanted. Readers name those that they miss.
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
        raise UserError(
            f"{name!r} is neither a folder nor a model in the Hugging Face cache {cache} (branch "
            f"main), and {what}. Give the path of a folder with config.json and the weights, or "
            "download the model where there is a network, with --download for example, and set "
            "HF_HOME to its cache"
        ) from error


def _cached_name(name: str, cache: Path) -> str:
    """``name`` as the cache spells it."""
    wanted = f"models--{name.replace('/', '--')}".lower()
    if cache.is_dir():
        for folder in sorted(cache.iterdir()):
            if folder.name.lower() == wanted:
                return folder.name.removeprefix("models--").replace("--", "/")
    return name
