"""Which optimizers update a model. The only module that names them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from paddle import Tensor, nn

from pypkg.config.optimizers import ADAMW_MOMENTS, is_muons
from pypkg.parallel.optimizer.loss_scaling import LossScale
from pypkg.parallel.optimizer.protocol import Optimizer
from pypkg.parallel.optimizer.rules.adafactor import Adafactor
from pypkg.parallel.optimizer.rules.adamw import AdamW
from pypkg.parallel.optimizer.rules.lion import Lion
from pypkg.parallel.optimizer.rules.muon import Muon
from pypkg.parallel.optimizer.rules.weights import Weights


@dataclass(frozen=True)
class UpdateOptions:
    """How parameters are updated.

    Attributes:
        beta1, beta2, epsilon, weight_decay: of AdamW, and as far as the optimizer has them.
        max_grad_norm: global norm that gradients are clipped to; 0 turns clipping off.
        sharding_stage: ZeRO stage, 0 to 3 (zero/stages.py); no effect without a sharding group.
        reduces_once: whether stages 1 and 2 reduce the sums of a step's gradients during its last
            backward pass. Otherwise stage 1 reduces them after it, and stage 2 reduces the
            gradients of each micro batch.
        overlaps_weights: in stages 1 and 2 updated parameters come beside the next forward pass;
            ``Updater.wait`` before another use of them.
        offload: optimizer state stays in host memory between the updates.
        loss_scale: for float16; None: the loss is not scaled.
        master_grad: gradients of 16-bit parameters accumulate in float32.
        optim: adamw, adamw_16bit_moment, adamw_8bit, lion, adafactor or muon.
        stochastic_rounding: bfloat16 parameters have no master weights and are rounded
            stochastically.
        muon_momentum: mu of Muon.
    """

    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    weight_decay: float = 0.0
    max_grad_norm: float = 0.0
    sharding_stage: int = 0
    reduces_once: bool = False
    overlaps_weights: bool = False
    offload: bool = False
    loss_scale: LossScale | None = None
    master_grad: bool = False
    optim: str = "adamw"
    stochastic_rounding: bool = False
    muon_momentum: float = 0.95


def decays(name: str, parameter: Tensor) -> bool:
    """Whether weight decay applies: to matrices, not to norm weights and biases.

    Loshchilov and Hutter (2019) decay every weight. One-dimensional parameters are left out since
    GPT-2, and PaddleNLP leaves them out by name.
    """
    return parameter.ndim > 1 and not name.endswith("bias")


def make_optimizers(model: nn.Layer, options: UpdateOptions) -> tuple[Optimizer, ...]:
    """The optimizers of a run; the first that takes a parameter updates it.

    Raises:
        ValueError: ``options.optim`` names none.
    """
    decayed = frozenset(n for n, p in model.named_parameters() if decays(n, p))
    common: dict[str, Any] = {
        "weight_decay": options.weight_decay,
        "decayed": decayed,
        "weights": Weights(options.stochastic_rounding),
    }
    betas: dict[str, Any] = {"beta1": options.beta1, "beta2": options.beta2}
    if options.optim == "lion":
        return (Lion(**betas, **common),)
    if options.optim == "adafactor":
        return Adafactor(True, **common), Adafactor(False, **common)
    if options.optim not in ADAMW_MOMENTS and options.optim != "muon":
        raise ValueError(f"there is no optimizer {options.optim!r}")
    form = ADAMW_MOMENTS.get(options.optim, "float32")
    adamw = AdamW(**betas, epsilon=options.epsilon, form=form, **common)
    if options.optim == "muon":
        return Muon(momentum=options.muon_momentum, takes=is_muons, **common), adamw
    return (adamw,)
