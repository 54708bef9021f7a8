"""Seconds of a training step on the slowest rank, by term; and speed, days and price of a run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from pypkg.config import Settings
from pypkg.models.architecture.config import ModelConfig
from pypkg.models.architecture.layer_split import ModelChunk, cut
from pypkg.parallel.mesh import Degrees
from pypkg.planner.memory import recomputed_layers
from pypkg.planner.micro_batch import Batch
from pypkg.planner.time.gpus import Gpu
from pypkg.planner.time.layer_time import OURS, Implementation, LayerTime, Seconds
from pypkg.planner.time.update_time import saved_bytes, state_bytes, update_seconds, update_work

# Python, dispatch and autograd of a layer, forward and backward, on one thread of a Xeon: measured
# by `pypkg bench train-step --host-time` (docs/benchmarks.md). A device that is faster waits.
HOST_SECONDS_PER_LAYER = 0.70e-3
_HOST_RATE = 20e9  # bytes per second between a GPU and host memory; PCIe 4.0 x16 has 32e9
_HOP = 5e-6  # seconds from a rank of a ring to the next, assumed
_DISK_RATE = 1e9  # bytes per second at which a checkpoint is written, assumed
# The terms of a step, in the order of a table.
TERMS = (
    "matrix products",
    "attention",
    "memory-bound operators",
    "tensor communication",
    "context communication",
    "host",
    "pipeline bubble",
    "pipeline communication",
    "gradient communication",
    "optimizer",
    "evaluation",
    "checkpoints",
)
# Relative standard error of each term, assumed; rates of links and of the host vary most.
TERM_ERRORS = {
    "matrix products": 0.1,
    "attention": 0.3,
    "memory-bound operators": 0.2,
    "tensor communication": 0.3,
    "context communication": 0.3,
    "host": 0.5,
    "pipeline bubble": 0.1,
    "pipeline communication": 0.3,
    "gradient communication": 0.5,
    "optimizer": 0.2,
    "evaluation": 0.2,
    "checkpoints": 1.0,
}


@dataclass(frozen=True)
class Cluster:
    """Machines of equal GPUs.

    Attributes:
        gpus_per_node: GPUs of a machine.
        network: bytes per second of all adapters of a machine together, in each direction.
    """

    gpu: Gpu
    gpus_per_node: int
    network: float

    def rate(self, stride: int, size: int) -> float:
        """Bytes per second that each rank of a group sends in a ring.

        Args:
            stride: difference of the global ranks of two consecutive members.
            size: size of the group.
        """
        within = self.gpu.link * self.gpu.link_efficiency
        if stride * (size - 1) < self.gpus_per_node:
            return within
        members = max(1, self.gpus_per_node // stride)  # of the group, in a machine
        return min(within, self.network * members / self.gpus_per_node * self.gpu.link_efficiency)


@dataclass(frozen=True)
class StepTime:
    """The time of a step.

    Attributes:
        terms: seconds by term, in the order of ``TERMS``; evaluation and checkpoints are spread
            over the steps.
        tokens: tokens of the global batch.
        world_size: number of GPUs.
    """

    terms: Mapping[str, float]
    tokens: int
    world_size: int

    @property
    def seconds(self) -> float:
        return sum(self.terms.values())

    def training_alone(self) -> StepTime:
        """Seconds of a step without evaluation and checkpoints, as in the log of a run."""
        terms = {
            name: seconds
            for name, seconds in self.terms.items()
            if name not in ("evaluation", "checkpoints")
        }
        return replace(self, terms=terms)

    @property
    def tokens_per_second(self) -> float:
        """Tokens per second of one GPU."""
        return self.tokens / self.seconds / self.world_size

    def mfu(self, config: ModelConfig, sequence: int, peak: float) -> float:
        """Model FLOPs utilisation, 0 to 1, as in the log of a run."""
        return config.flops_per_token(sequence) * self.tokens_per_second / peak

    def days(self, tokens: float) -> float:
        """Days of a run over ``tokens`` tokens."""
        return tokens / (self.tokens_per_second * self.world_size) / 86400

    def price(self, tokens: float, per_gpu_hour: float) -> float:
        """Price of a run over ``tokens`` tokens, in the currency of ``per_gpu_hour``."""
        return self.days(tokens) * 24 * self.world_size * per_gpu_hour


def plan_time(
    settings: Settings,
    config: ModelConfig,
    degrees: Degrees,
    cluster: Cluster,
    element_bytes: int = 2,
    implementation: Implementation = OURS,
) -> StepTime:
    """The time of a step.

    Args:
        settings: settings of the run; its degrees are not read.
        element_bytes: bytes of a weight or activation.
    """
    step = _Step(settings, config, degrees, cluster, element_bytes, implementation)
    return StepTime(step.terms(), step.tokens, degrees.world_size)


class _Step:
    def __init__(
        self,
        settings: Settings,
        config: ModelConfig,
        degrees: Degrees,
        cluster: Cluster,
        element_bytes: int,
        implementation: Implementation,
    ) -> None:
        self._settings, self._config, self._degrees = settings, config, degrees
        self._cluster, self._bytes, self._made = cluster, element_bytes, implementation
        self._micro_batches = settings.gradient_accumulation_steps
        rows, sequence = settings.per_device_train_batch_size, settings.max_seq_length
        self._batch = Batch(rows, sequence, degrees.context)
        samples = rows * self._micro_batches * degrees.data * degrees.sharding
        self.tokens = samples * sequence
        self._layer = self._layer_time(self._batch)
        self._parameters = config.num_parameters() / (degrees.tensor * degrees.pipeline)

    def _layer_time(self, batch: Batch) -> LayerTime:
        degrees = self._degrees
        return LayerTime(
            self._config,
            self._cluster.gpu,
            batch,
            tensor=degrees.tensor,
            tensor_rate=self._cluster.rate(1, degrees.tensor),
            sequence_parallel=degrees.sequence_parallel,
            ring=degrees.ring,
            context_rate=self._cluster.rate(degrees.tensor, degrees.context),
            element_bytes=self._bytes,
            implementation=self._made,
        )

    def terms(self) -> dict[str, float]:
        """Seconds by term, those that take any."""
        m, degrees = self._micro_batches, self._degrees
        forward, backward, layers = self._slowest_stage()
        work = forward + backward
        host = max(0.0, layers * HOST_SECONDS_PER_LAYER - work.total)
        found = {
            "matrix products": m * work.products,
            "attention": m * work.attention,
            "memory-bound operators": m * work.memory,
            "tensor communication": m * work.tensor,
            "context communication": m * work.context,
            "host": m * host,
            "pipeline bubble": (degrees.pipeline - 1) / degrees.virtual_stages * work.total,
            "pipeline communication": m * self._messages(),
            "gradient communication": self._gradients(work.total, backward.total),
            "optimizer": self._update(),
        }
        step = sum(found.values())
        found["evaluation"] = self._evaluation(forward)
        found["checkpoints"] = self._checkpoints(step)
        return {name: found[name] for name in TERMS if found[name] > 0}

    def _slowest_stage(self) -> tuple[Seconds, Seconds, int]:
        """A micro batch on the stage that takes longest: forward, backward, number of layers."""
        degrees = self._degrees
        chunks = cut(self._config.num_hidden_layers, degrees.pipeline, degrees.virtual_stages)
        stages = [chunks[stage :: degrees.pipeline] for stage in range(degrees.pipeline)]
        return max((self._stage(own) for own in stages), key=lambda s: (s[0] + s[1]).total)

    def _stage(self, chunks: list[ModelChunk]) -> tuple[Seconds, Seconds, int]:
        settings, layer = self._settings, self._layer
        layers = sum(len(chunk.layers) for chunk in chunks)
        again = sum(
            sum(map(bool, recomputed_layers(settings, chunk, self._degrees.pipeline)))
            for chunk in chunks
        )
        parts = {
            "full": layer.forward,
            "full_attn": layer.attention_forward,
            "core_attn": layer.core_forward,
        }
        forward, backward = layer.forward() * layers, layer.backward() * layers
        if again:
            backward = backward + parts[settings.recompute_granularity]() * again
        if any(chunk.is_last for chunk in chunks):
            forward = forward + layer.head()
        return forward, backward, layers

    def _messages(self) -> float:
        """Activations to the next stage and gradients back, of a micro batch."""
        degrees = self._degrees
        if degrees.pipeline == 1:
            return 0.0
        rate = self._cluster.rate(self._stride("pipeline"), degrees.pipeline)
        size = self._bytes * self._batch.tokens * self._config.hidden_size
        return 2 * degrees.virtual_stages * size / rate

    def _gradients(self, work: float, backward: float) -> float:
        """Seconds that a step waits for gradients and weights to be sent (docs/parallelism.md).

        A reduction to owners and a broadcast send (z - 1) / z of the whole each, and an all-reduce
        twice that.
        """
        degrees, settings, m = self._degrees, self._settings, self._micro_batches
        n, width = self._parameters, self._bytes
        gradient = 4 if settings.amp_master_grad else width
        z, d = degrees.sharding, degrees.data * degrees.context
        exposed = 0.0
        stage = settings.sharding_stage if z > 1 else 0
        if stage:
            rate = self._cluster.rate(self._stride("sharding"), z)
            reduce, send = (each * n * (z - 1) / z / rate for each in (gradient, width))
            if stage == 3:
                gathers = 3 if settings.recompute else 2
                hops = (gathers + 1) * self._operations() * (z - 1) * _HOP
                exposed = m * max(0.0, gathers * send + reduce + hops - work)
            elif settings.reduces_once:
                exposed = max(0.0, reduce - backward) + send
            elif stage == 2:
                overlap = backward if self._made.gradients_overlap else 0.0
                exposed = m * max(0.0, reduce - overlap) + send
            else:
                exposed = reduce + send + 2 * self._operations() * (z - 1) * _HOP
        if d > 1:
            held = n / z if stage >= 2 else n
            rate = self._replica_rate()
            exposed += 2 * gradient * held * (d - 1) / d / rate
        return exposed

    def _replica_rate(self) -> float:
        """Of data-parallel ranks and those of a context group together: their slower links."""
        degrees, rate = self._degrees, self._cluster.rate
        rates = [rate(degrees.tensor, degrees.context)] if degrees.context > 1 else []
        if degrees.data > 1:
            rates.append(rate(self._stride("data"), degrees.data))
        return min(rates)

    def _operations(self) -> int:
        """Matrices of a rank: each is reduced, sent and gathered by itself in stages 1 and 3."""
        return 4 * self._config.num_hidden_layers // self._degrees.pipeline + 2

    def _update(self) -> float:
        """Seconds of the update on the rank with the most work."""
        settings, degrees, gpu = self._settings, self._degrees, self._cluster.gpu
        stage, held, pieces = settings.sharding_stage, self._parameters, degrees.tensor
        rate = self._cluster.rate(1, pieces)
        if stage:
            held /= degrees.sharding
        if stage == 3 and degrees.sharding > 1:
            pieces *= degrees.sharding
            rate = min(rate, self._cluster.rate(self._stride("sharding"), degrees.sharding))
        work = update_work(settings, self._config, held, pieces, self._bytes)
        moved = 2 * state_bytes(settings) * held if settings.offloads_optimizer else 0.0
        return update_seconds(work, gpu, rate) + moved / _HOST_RATE

    def _evaluation(self, forward: Seconds) -> float:
        s = self._settings
        if not s.evaluates or s.whole_splits or s.eval_iters is None:
            return 0.0
        rows = s.per_device_eval_batch_size / s.per_device_train_batch_size
        batches = s.eval_iters + self._degrees.pipeline - 1
        return batches * rows * forward.total / s.evaluation_interval

    def _checkpoints(self, step: float) -> float:
        """Weights, master weights and moments, at an assumed rate of the file system."""
        s = self._settings
        if not s.saves or s.use_async_save:
            return 0.0
        state = 0 if s.ignore_save_lr_and_optim else saved_bytes(s, self._bytes)
        size = self._config.num_parameters() * (self._bytes + state)
        return size / _DISK_RATE / s.save_interval

    def _stride(self, axis: str) -> int:
        """Difference of the global ranks of neighbours on an axis (parallel/mesh.py)."""
        degrees = self._degrees
        innermost = degrees.tensor * degrees.context
        inner = {"sharding": innermost, "pipeline": innermost}
        if degrees.topology_order == "sharding_first":
            inner["sharding"] *= degrees.pipeline
        else:
            inner["pipeline"] *= degrees.sharding
        inner["data"] = innermost * degrees.pipeline * degrees.sharding
        return inner[axis]
