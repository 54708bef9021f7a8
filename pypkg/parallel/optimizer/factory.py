"""Creates the optimizers of a model. It is the only module that names them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from paddle import Tensor, nn

from pypkg.parallel.optimizer.loss_scaling import LossScale
from pypkg.parallel.optimizer.protocol import Optimizer
from pypkg.parallel.optimizer.rules.adafactor import Adafactor
from pypkg.parallel.optimizer.rules.adamw import AdamW
from pypkg.parallel.optimizer.rules.lion import Lion
from pypkg.parallel.optimizer.rules.muon import Muon
from pypkg.parallel.optimizer.rules.weights import Weights
from pypkg.parallel.update_rules import ADAMW_MOMENTS, updated_by_muon


@dataclass(frozen=True)
class UpdateOptions:
    """How parameters are updated.

    Attributes:
        beta1, beta2, epsilon, weight_decay: of AdamW; other optimizers use those that they have.
        max_grad_norm: the global norm to which gradients are clipped; 0 disables clipping.
        sharding_stage: ZeRO stage, 0 to 3 (zero/stages.py); no effect without a sharding group.
        reduces_once: whether stages 1 and 2 reduce the sums of a step's gradients during its last
            backward pass. Otherwise stage 1 reduces them after it, and stage 2 reduces the
            gradients of each micro batch.
        overlaps_weights: whether stages 1 and 2 broadcast updated parameters during the next
            forward pass. Any other use of the parameters must call ``Updater.wait`` first.
        offload: whether optimizer state stays in host memory between updates.
        loss_scale: for float16; None: the loss is not scaled.
        master_grad: whether gradients of 16-bit parameters accumulate in float32.
        optim: adamw, adamw_16bit_moment, adamw_8bit, lion, adafactor or muon.
        stochastic_rounding: whether bfloat16 parameters are rounded stochastically instead of
            having master weights.
        muon_momentum: mu of Muon.
        rate_factors: factors of the learning rate by name of the parameter; the default is 1.
        measures_layers: whether the gradient norm of each layer is measured too.
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
    rate_factors: Mapping[str, float] = field(default_factory=dict)
    measures_layers: bool = False


def decays(name: str, parameter: Tensor) -> bool:
    """Whether weight decay applies to a parameter: to matrices, not to norm weights and biases.

    Loshchilov and Hutter (2019) decay every weight. Since GPT-2, one-dimensional parameters are
    usually excluded; PaddleNLP excludes them by name.
    """
    return parameter.ndim > 1 and not name.endswith("bias")


def make_optimizers(model: nn.Layer, options: UpdateOptions) -> tuple[Optimizer, ...]:
    """The optimizers of a run. The first one that takes a parameter updates it.

    Raises:
        ValueError: ``options.optim`` is unknown.
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
        return Muon(momentum=options.muon_momentum, takes=updated_by_muon, **common), adamw
    return (adamw,)
