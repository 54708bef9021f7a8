"""Which optimizers update a model. The only module that names them."""

from __future__ import annotations

from dataclasses import dataclass

from paddle import Tensor, nn

from pypkg.parallel.optimizer.adamw import AdamW
from pypkg.parallel.optimizer.loss_scaling import LossScale
from pypkg.parallel.optimizer.protocol import Optimizer


@dataclass(frozen=True)
class UpdateOptions:
    """How parameters are updated.

    Attributes:
        beta1, beta2, epsilon, weight_decay: of AdamW.
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


def decays(name: str, parameter: Tensor) -> bool:
    """Whether weight decay applies: to matrices, not to norm weights and biases.

    Loshchilov and Hutter (2019) decay every weight. One-dimensional parameters are left out since
    GPT-2, and PaddleNLP leaves them out by name.
    """
    return parameter.ndim > 1 and not name.endswith("bias")


def make_optimizers(model: nn.Layer, options: UpdateOptions) -> tuple[Optimizer, ...]:
    """The optimizers of a run; the first that takes a parameter updates it."""
    return (
        AdamW(
            beta1=options.beta1,
            beta2=options.beta2,
            epsilon=options.epsilon,
            weight_decay=options.weight_decay,
            decayed=frozenset(n for n, p in model.named_parameters() if decays(n, p)),
        ),
    )
