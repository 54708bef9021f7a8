"""Checkpoints of every layout: what ranks write and read."""

from __future__ import annotations

import io
import tempfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import paddle
from whole_values import whole_parameters, whole_state

from pypkg.models.architecture.registry import weight_map
from pypkg.models.decoder import Decoder
from pypkg.models.pretrained import model_config_json, model_tensors, weight_reader
from pypkg.models.weights.formats import stored_tensor
from pypkg.models.weights.formats.safetensors import read_safetensors
from pypkg.models.weights.formats.tensor_files import TensorFiles
from pypkg.models.weights.model_folder import write_json
from pypkg.models.weights.save_plan import SavePlan, TensorSet
from pypkg.models.weights.tensor_writer import ThreadWriter
from pypkg.models.weights.writer_process import ProcessWriter, WriterProcess
from pypkg.parallel import mesh
from pypkg.parallel.comm.collective import from_first_rank
from pypkg.parallel.optimizer.updater import Updater
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
        plan=SavePlan(
            [
                counting(each, converted)
                for each in (model_tensors(model), optimizer_tensors(updater))
            ]
        ),
        add_files=lambda to: write_json(to / "config.json", model_config_json(model)),
        settings_json="{}",
    )
    num_bytes = checkpoint.num_bytes_of(mesh.current().rank)
    path = checkpoint.finish()
    through_memory = write_through_memory(model, updater, output_dir, path)
    loaded = load(model, updater, path)
    files, names = TensorFiles(path), weight_map(model.config)
    stored = {
        source: value
        for name, whole in parameters.items()
        for source, value in names.to_checkpoint(name, whole).items()
    }
    again = whole_state(updater) | whole_parameters(model.config, dict(model.named_parameters()))
    return {
        **loaded,
        "num_bytes": num_bytes,
        "converted": converted.total(),
        **through_memory,
        "weights_kept": files.shapes().keys() == stored.keys()
        and all(np.array_equal(files.read(n, "float32"), value) for n, value in stored.items()),
        "state_kept": all(
            np.array_equal(again[key], value) for key, value in (state | parameters).items()
        ),
    }


def load(model: Decoder, updater: Updater, checkpoint: Path) -> dict[str, Any]:
    """Loads weights and optimizer state in place of others.

    Returns:
        Bytes of tensors that the calls of read have returned, for each byte that this rank holds.
    """
    for parameter in model.parameters():
        held = getattr(parameter, "fw_storage", parameter)
        held.set_value(paddle.full_like(held, -1.0))
    damage_state(updater)
    weights = [getattr(each, "fw_storage", each) for each in model.parameters()]
    with ReadBytes() as read:
        updater.assign_parameters(weight_reader(checkpoint, model.config, "float32"))
    ratios = [read.total / num_bytes(weights)]
    with ReadBytes() as read:
        load_optimizer(checkpoint, updater)
    ratios.append(read.total / num_bytes(updater.optimizer.state_tensors()))
    return {"read_weights": ratios[0], "read_state": ratios[1]}


def num_bytes(tensors: Iterable[paddle.Tensor]) -> int:
    return sum(tensor.size * tensor.element_size() for tensor in tensors)


class ReadBytes:
    """Counts the bytes that the reader of tensors reads from files, without their headers."""

    def __init__(self) -> None:
        self.total = 0

    def __enter__(self) -> ReadBytes:
        self._open_file, counter = stored_tensor.open_file, self

        class Counted(io.FileIO):
            def readinto(self, buffer: Any) -> int:
                count = super().readinto(buffer)
                counter.total += count
                return count

        def open_file(path: Path) -> tuple[io.RawIOBase, int]:
            return Counted(path), path.stat().st_size

        stored_tensor.open_file = open_file
        return self

    def __exit__(self, *_: object) -> None:
        stored_tensor.open_file = self._open_file


def write_through_memory(
    model: Decoder, updater: Updater, output_dir: str, expected: Path
) -> dict[str, Any]:
    """Saves of ranks that hand each other parts and whole tensors through memory.

    Threads write them, and processes, which get a part of what they write at a time. Where each
    rank is on a machine of its own, its process gets from it what communication has brought.

    Returns:
        Whether all hold the tensors of ``expected``, and for the last two the largest bytes of a
        rank relative to the mean.
    """
    found, shares = [], []
    in_process = partial(ProcessWriter, process=WRITER_PROCESS)
    apart = SharedMemory(100_000)
    apart._hosts = [str(rank) for rank in range(mesh.current().world_size)]
    for memory, make_writer, watched in (
        (SharedMemory(None), ThreadWriter, without_communication),
        (SharedMemory(100_000), in_process, without_communication),
        (apart, in_process, lambda tensors: tensors),
    ):
        checkpoint = CheckpointWriting(
            output_dir,
            TrainerState(global_step=2 + len(found)),
            plan=SavePlan(
                [
                    watched(each)
                    for each in (model_tensors(model), optimizer_tensors(updater, model.config))
                ],
                memory.neighbours(),
            ),
            add_files=lambda _: None,
            settings_json="{}",
            memory=memory,
            make_writer=make_writer,
        )
        written = [checkpoint.num_bytes_of(rank) for rank in range(mesh.current().world_size)]
        shares.append(max(written) * len(written) / sum(written))
        found.append(tensors_of(checkpoint.finish()))
    same = all(each == tensors_of(expected) for each in found)
    return {"same_tensors": same, "share_together": shares[1], "share_apart": shares[2]}


def tensors_of(checkpoint: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Dtype, shape and bytes of each tensor in all files."""
    found = {}
    for file in checkpoint.glob("*.safetensors"):
        content = file.read_bytes()
        for name, tensor in read_safetensors(file).items():
            data = content[tensor.offset : tensor.offset + tensor.num_bytes]
            assert name not in found
            found[name] = tensor.dtype, tuple(tensor.shape), data
    return found


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
        tensor.set_value(paddle.full_like(tensor, 3.0))
