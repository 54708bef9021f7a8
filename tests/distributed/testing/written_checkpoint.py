"""Checkpoints of every layout: what ranks write and read."""

from __future__ import annotations

import tempfile
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import paddle
from whole_values import whole_state

from pypkg.models.architecture.registry import weight_map
from pypkg.models.decoder import Decoder
from pypkg.models.pretrained import model_tensors
from pypkg.models.weights.formats.tensor_files import TensorFiles
from pypkg.models.weights.save_plan import TensorSet
from pypkg.models.weights.tensor_writer import ThreadWriter
from pypkg.models.weights.writer_process import ProcessWriter, WriterProcess
from pypkg.parallel import mesh
from pypkg.parallel.comm.collective import from_first_rank
from pypkg.parallel.optimizer.updater import Updater
from pypkg.training.checkpoint.manifest import read_manifest
from pypkg.training.checkpoint.reading import load_optimizer
from pypkg.training.checkpoint.shared_memory import SharedMemory
from pypkg.training.checkpoint.writing import CheckpointWriting, optimizer_tensors
from pypkg.training.state import TrainerState

WRITER_PROCESS = WriterProcess()  # starts when it is first used


def write_and_read(
    model: Decoder, updater: Updater, folder: Path, parameters: dict, state: dict
) -> dict[str, Any]:
    """A checkpoint of ``model``: bytes that this rank writes, and whether it holds all of it."""
    output_dir = from_first_rank(lambda: tempfile.mkdtemp(dir=folder))
    converted = Counter()
    checkpoint = CheckpointWriting(
        output_dir,
        TrainerState(global_step=1),
        tensor_sets=[
            counting(each, converted) for each in (model_tensors(model), optimizer_tensors(updater))
        ],
        add_files=lambda _: None,
        settings_json="{}",
    )
    num_bytes = checkpoint.num_bytes_of(mesh.current().rank)
    path = checkpoint.finish()
    same_files = write_through_memory(model, updater, output_dir, path)
    damage_state(updater)
    load_optimizer(path, updater)
    files, names = TensorFiles(path), weight_map(model.config)
    stored = {
        source: value
        for name, whole in parameters.items()
        for source, value in names.to_checkpoint(name, whole).items()
    }
    again = whole_state(updater)
    return {
        "num_bytes": num_bytes,
        "converted": converted.total(),
        "same_files": same_files,
        "weights_kept": files.shapes().keys() == stored.keys()
        and all(np.array_equal(files.read(n, "float32"), value) for n, value in stored.items()),
        "state_kept": all(np.array_equal(again[key], value) for key, value in state.items()),
    }


def write_through_memory(model: Decoder, updater: Updater, output_dir: str, expected: Path) -> bool:
    """Whether ranks that hand each other parts through memory write the files of ``expected``.

    Threads write them, and processes, which get a part of what they write at a time.
    """
    found = []
    for memory, make_writer in (
        (SharedMemory(None), ThreadWriter),
        (SharedMemory(100_000), partial(ProcessWriter, process=WRITER_PROCESS)),
    ):
        checkpoint = CheckpointWriting(
            output_dir,
            TrainerState(global_step=2 + len(found)),
            tensor_sets=[
                without_communication(each)
                for each in (model_tensors(model), optimizer_tensors(updater, model.config))
            ],
            add_files=lambda _: None,
            settings_json="{}",
            memory=memory,
            make_writer=make_writer,
        )
        found.append(read_manifest(checkpoint.finish()))
    wanted = read_manifest(expected)
    return all(
        each.files[name] == record
        for each in found
        for name, record in wanted.files.items()
        if name.endswith(".safetensors")
    )


def without_communication(tensors: TensorSet) -> TensorSet:
    """``tensors``, of which those that are whole on no rank are not brought to a rank."""
    divided = {unit.name for unit in tensors.units if unit.division is not None}

    def read(name: str, writer: int) -> np.ndarray | None:
        assert name not in divided
        return tensors.read(name, writer)

    return replace(tensors, read=read)


def counting(tensors: TensorSet, converted: Counter) -> TensorSet:
    """``tensors``, of which the bytes that this rank brings to host memory are counted."""

    def read(name: str, writer: int) -> np.ndarray | None:
        value = tensors.read(name, writer)
        converted[tensors.stem] += 0 if value is None else value.nbytes
        return value

    return replace(tensors, read=read)


def damage_state(updater: Updater) -> None:
    for tensor in updater.optimizer.state_tensors():
        tensor.set_value(paddle.full_like(tensor, -1.0))
