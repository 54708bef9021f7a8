"""Time of an update: bytes and products of each rule, against what its operators move on a CPU."""

from __future__ import annotations

from dataclasses import replace

import paddle
import pytest
from moved_bytes import Moved

from pypkg.config import Settings
from pypkg.models.architecture.registry import load_config
from pypkg.parallel import mesh
from pypkg.parallel.mesh import Degrees
from pypkg.parallel.optimizer.distribute import distribute
from pypkg.parallel.optimizer.factory import UpdateOptions
from pypkg.planner.time.gpus import GPUS
from pypkg.planner.time.step_time import Cluster, plan_time
from pypkg.planner.time.update_time import bytes_moved, newton_schulz_bytes, update_work

SHAPE = (256, 384)
RULES = ("adamw", "adamw_16bit_moment", "adamw_8bit", "lion", "adafactor", "muon")
ONE = Degrees()
LLAMA = load_config("meta-llama/Llama-2-7b")


class Model(paddle.nn.Layer):
    """One matrix."""

    def __init__(self, dtype: str) -> None:
        super().__init__()
        self.weight = self.create_parameter(list(SHAPE), dtype=dtype)


def counted(monkeypatch: pytest.MonkeyPatch, optim: str, dtype: str, stochastic: bool) -> Moved:
    """What the second update moves, without the gradient norm."""
    model = Model(dtype)
    options = UpdateOptions(optim=optim, stochastic_rounding=stochastic, max_grad_norm=0.0)
    _, updater = distribute(model, options, mesh.Mesh())
    for is_last in (False, True):
        model.weight.grad = paddle.ones(SHAPE).astype(dtype)
        if not is_last:
            updater.step(0.1)
    with monkeypatch.context() as patch:
        moved = Moved(patch)
        updater.step(0.1)
    return moved


@pytest.mark.parametrize("optim", RULES)
@pytest.mark.parametrize(("dtype", "width"), [("float32", 4), ("bfloat16", 2)])
def test_bytes_are_those_of_the_operators(monkeypatch, optim, dtype, width):
    moved = counted(monkeypatch, optim, dtype, stochastic=False)
    size = SHAPE[0] * SHAPE[1]
    planned = size * bytes_moved(optim, width)
    if optim == "muon":
        planned += newton_schulz_bytes(*SHAPE)
    assert moved.bytes == pytest.approx(planned, rel=0.02)


@pytest.mark.parametrize("optim", ["adamw", "lion"])
def test_bytes_of_stochastic_rounding(monkeypatch, optim):
    moved = counted(monkeypatch, optim, "bfloat16", stochastic=True)
    planned = SHAPE[0] * SHAPE[1] * bytes_moved(optim, 2, is_stochastic=True)
    assert moved.bytes == pytest.approx(planned, rel=0.02)


def test_products_of_muon(monkeypatch):
    """Each of five iterations multiplies three times, in the smaller of both sizes."""
    moved = counted(monkeypatch, "muon", "float32", stochastic=False)
    rows, columns = SHAPE
    assert moved.flops == 5 * (2 * rows * rows * columns * 2 + 2 * rows**3)
    config = LLAMA.replace(num_hidden_layers=1, hidden_size=256, intermediate_size=384,
                           num_attention_heads=2, num_key_value_heads=2, head_dim=128)  # fmt: skip
    work = update_work(Settings(optim="muon"), config, config.num_parameters())
    square = 5 * (4 + 2) * 256**3  # query, key, value and output
    assert work.flops == pytest.approx(4 * square + 3 * moved.flops)


def update_of(optim: str, degrees: Degrees = ONE, **settings) -> float:
    given = Settings(
        optim=optim, bf16=True, max_seq_length=4096, per_device_train_batch_size=1,
        save_strategy="no", evaluation_strategy="no", **settings,
    )  # fmt: skip
    cluster = Cluster(GPUS["a100-80g"], 8, 1e11)
    return plan_time(given, LLAMA, degrees, cluster).terms["optimizer"]


def test_updates_of_a_layout():
    gpu, n = GPUS["a100-80g"], LLAMA.num_parameters()
    assert update_of("adamw") == pytest.approx(28 * n / gpu.memory_rate)
    for optim in RULES:
        whole = update_of(optim)
        divided = update_of(optim, Degrees(sharding=4), sharding=("stage1",))
        assert divided == pytest.approx(whole / 4)
    assert update_of("muon") > update_of("lion") > 3 * update_of("adamw")
    # Pieces of each matrix are sent twice in bfloat16, to the rank that owns it and back.
    hidden = n - 2 * LLAMA.vocab_size * LLAMA.hidden_size
    sent = 4 * 0.75 * hidden / 4 / (gpu.link * gpu.link_efficiency)
    apart = update_of("muon") / 4
    assert update_of("muon", Degrees(tensor=4)) - apart == pytest.approx(sent, rel=1e-3)


def test_offloaded_state_is_that_of_the_rule():
    """Moments and masters cross to the device and back."""
    given = {"sharding": ("stage1", "offload")}
    n = LLAMA.num_parameters() / 2
    for optim, state in (("adamw", 12), ("lion", 8), ("adamw_16bit_moment", 8)):
        moved = update_of(optim, Degrees(sharding=2), **given)
        stays = update_of(optim, Degrees(sharding=2), sharding=("stage1",))
        assert moved - stays == pytest.approx(2 * state * n / 20e9)


def test_checkpoints_hold_the_state_of_the_rule():
    saved = {}
    for optim in ("adamw", "lion", "adafactor"):
        given = Settings(optim=optim, bf16=True, max_seq_length=4096, save_strategy="steps",
                         per_device_train_batch_size=1, save_steps=50, max_steps=100,
                         evaluation_strategy="no")  # fmt: skip
        cluster = Cluster(replace(GPUS["a100-80g"]), 8, 1e11)
        saved[optim] = plan_time(given, LLAMA, Degrees(), cluster).terms["checkpoints"]
    n = LLAMA.num_parameters() / 1e9 / 50
    wanted = {"adamw": 14 * n, "lion": 10 * n, "adafactor": 6 * n}
    assert saved == pytest.approx(wanted)
