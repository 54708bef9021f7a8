"""Loads the model that a command line names, and its tokenizer."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from pathlib import Path

from pypkg.data.tokenizers.base import Tokenizer
from pypkg.data.tokenizers.load import find_tokenizer, load_tokenizer
from pypkg.device.capabilities import probe
from pypkg.errors import UserError
from pypkg.files.json_files import read_json
from pypkg.generation.text import end_tokens
from pypkg.models.architecture.config import ModelConfig
from pypkg.models.building import Model
from pypkg.models.pretrained import from_pretrained
from pypkg.models.weights.hub import find_weights
from pypkg.models.weights.model_folder import CONFIG_FILE
from pypkg.ops.dispatch import half_on_cpu
from pypkg.parallel import mesh
from pypkg.training.checkpoint.folders import checkpoints
from pypkg.training.checkpoint.verify import require_whole_weights
from pypkg.training.start.attention import attention_for

logger = logging.getLogger("pypkg")

_GENERATION_FILE = "generation_config.json"


@dataclass(frozen=True)
class Source:
    """Where a model comes from.

    Attributes:
        checkpoint: a folder with config.json and weights, the output_dir of a run, whose newest
            checkpoint is taken, or a name in the Hugging Face cache.
        tokenizer: a folder or file of a tokenizer; None: the one beside the weights.
        dtype: "float32", "float16" or "bfloat16"; None: bfloat16 on a GPU that has it, else
            float32.
        device: "cpu" or "gpu"; None: a GPU if there is one.
    """

    checkpoint: str
    tokenizer: str | None = None
    dtype: str | None = None
    device: str | None = None

    def folder(self) -> Path:
        """The folder with the weights.

        Raises:
            UserError: there is none.
        """
        found = checkpoints(self.checkpoint)
        if found:
            return found[-1][1]
        folder = find_weights(self.checkpoint)
        if not os.path.lexists(folder / CONFIG_FILE):
            raise UserError(
                f"{folder} holds neither a checkpoint-N of a run nor the {CONFIG_FILE} of a model; "
                "give the output_dir of a run that has saved, or the folder of a model"
            )
        return folder

    def find_tokenizer(self) -> Tokenizer | None:
        """The tokenizer; None where none is named and none lies beside the weights.

        Raises:
            UserError: the named one cannot be read.
        """
        if self.tokenizer is not None:
            return load_tokenizer(self.tokenizer)
        folder = self.folder()
        return load_tokenizer(folder) if find_tokenizer(folder) else None

    def need_tokenizer(self, purpose: str) -> Tokenizer:
        """The tokenizer.

        Raises:
            UserError: there is none; the message names ``purpose``, which needs one.
        """
        tokenizer = self.find_tokenizer()
        if tokenizer is None:
            raise UserError(
                f"there is no tokenizer in {self.folder()}, which {purpose} needs; give one with "
                "--tokenizer FOLDER"
            )
        return tokenizer

    def end_ids(self, config: ModelConfig, tokenizer: Tokenizer) -> frozenset[int]:
        """The tokens that end a text: ``end_tokens``, and those of generation_config.json.

        Raises:
            UserError: that file is not JSON.
        """
        file = self.folder() / _GENERATION_FILE
        named = read_json(file).get("eos_token_id") if file.is_file() else None
        more = named if isinstance(named, list) else [named]
        return end_tokens(config, tokenizer) | {each for each in more if type(each) is int}


def load(source: Source) -> Model:
    """The model in evaluation mode, or this rank's part of it.

    Raises:
        UserError: the weights are damaged or cannot be loaded, or the device does not suit.
    """
    capabilities = probe(source.device)
    dtype = source.dtype
    if dtype is None:
        dtype = "float32" if capabilities.bfloat16_obstacle() else "bfloat16"
    if capabilities.device == "cpu" and dtype != "float32":
        half_on_cpu.install()
    if mesh.current().rank == 0:
        require_whole_weights(source.folder())
    model = from_pretrained(source.folder(), dtype)
    model.use_attention(attention_for(model.config, dtype, capabilities, "auto"))
    logger.info(
        "%s: %.1f M parameters in %s on %s",
        *(source.folder(), model.config.num_parameters() / 1e6, dtype, capabilities.device_name),
    )
    return model
