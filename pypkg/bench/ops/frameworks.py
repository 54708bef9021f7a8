"""One interface to the frameworks that baselines are written in."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

if TYPE_CHECKING:
    import paddle
    import torch

    Gradients = tuple[paddle.Tensor, ...]


class Framework(Protocol):
    """Tensors, gradients and clocks of one framework, on the device of the benchmark."""

    def tensor(self, array: np.ndarray, dtype: str | None) -> Any:
        """A leaf tensor. With a dtype it is cast to it and requires a gradient."""

    def tensor_like(self, array: np.ndarray, tensor: Any) -> Any:
        """A tensor with the values of ``array`` and the dtype of ``tensor``."""

    def fresh(self, tensor: Any) -> Any:
        """A copy with its own memory, which is not a leaf and propagates gradients."""

    def array(self, tensor: Any) -> np.ndarray:
        """The values in float64."""

    def gradients(
        self, outputs: Sequence[Any], inputs: Sequence[Any], output_gradients: Sequence[Any]
    ) -> Sequence[Any]:
        """Gradients of the inputs. The call frees the tensors saved by the forward pass."""

    def synchronize(self) -> None:
        """Waits until the device has finished all work."""

    def matmul(self, a: Any, b: Any) -> Any:
        """The product of two matrices."""


class PaddleFramework:
    def __init__(self) -> None:
        import paddle

        self._paddle = paddle
        self._on_gpu = paddle.device.get_device().startswith("gpu")
        self._loss = _loss_with_gradients()

    def tensor(self, array: np.ndarray, dtype: str | None) -> paddle.Tensor:
        tensor = self._paddle.to_tensor(array)
        if dtype is not None:
            tensor = tensor.astype(getattr(self._paddle, dtype)).detach()
            tensor.stop_gradient = False
        return tensor

    def tensor_like(self, array: np.ndarray, tensor: paddle.Tensor) -> paddle.Tensor:
        return self._paddle.to_tensor(array).astype(tensor.dtype)

    def fresh(self, tensor: paddle.Tensor) -> paddle.Tensor:
        return tensor.clone()

    def array(self, tensor: paddle.Tensor) -> np.ndarray:
        return tensor.detach().astype("float64").numpy()

    def gradients(
        self,
        outputs: Sequence[paddle.Tensor],
        inputs: Sequence[paddle.Tensor],
        output_gradients: Sequence[paddle.Tensor],
    ) -> Sequence[paddle.Tensor]:
        return self._paddle.grad([self._loss(lambda: tuple(output_gradients), *outputs)], inputs)

    def synchronize(self) -> None:
        if self._on_gpu:
            self._paddle.device.synchronize()

    def matmul(self, a: paddle.Tensor, b: paddle.Tensor) -> paddle.Tensor:
        with self._paddle.no_grad():
            return self._paddle.matmul(a, b)


def _loss_with_gradients() -> Callable[..., Any]:
    """A function that makes a loss with given gradients of the outputs.

    paddle.grad would copy gradients that it receives as arguments.
    """
    import paddle

    class Loss(paddle.autograd.PyLayer):
        @staticmethod
        def forward(
            ctx: Any, get_gradients: Callable[[], Gradients], *outputs: paddle.Tensor
        ) -> paddle.Tensor:
            ctx.get_gradients = get_gradients
            return paddle.zeros([], outputs[0].dtype)

        @staticmethod
        def backward(ctx: Any, *_: paddle.Tensor) -> Gradients:
            return ctx.get_gradients()

    return Loss.apply


class TorchFramework:
    def __init__(self, threads: int) -> None:
        import torch

        self._torch = torch
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        torch.set_num_threads(threads)

    def tensor(self, array: np.ndarray, dtype: str | None) -> torch.Tensor:
        tensor = self._torch.from_numpy(array).to(self._device)
        if dtype is not None:
            # .to() with an equal dtype shares the memory of the array, which a run may overwrite.
            tensor = tensor.to(getattr(self._torch, dtype), copy=True).requires_grad_()
        return tensor

    def tensor_like(self, array: np.ndarray, tensor: torch.Tensor) -> torch.Tensor:
        return self._torch.from_numpy(array).to(tensor)

    def fresh(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.clone()

    def array(self, tensor: torch.Tensor) -> np.ndarray:
        return tensor.detach().double().cpu().numpy()

    def gradients(
        self,
        outputs: Sequence[torch.Tensor],
        inputs: Sequence[torch.Tensor],
        output_gradients: Sequence[torch.Tensor],
    ) -> Sequence[torch.Tensor]:
        return self._torch.autograd.grad(outputs, inputs, output_gradients)

    def synchronize(self) -> None:
        if self._device == "cuda":
            self._torch.cuda.synchronize()

    def matmul(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        with self._torch.no_grad():
            return a @ b

    def compile(self, function: Callable[..., Any]) -> Callable[..., Any]:
        return self._torch.compile(function, dynamic=False)


def available_frameworks(threads: int) -> tuple[dict[str, Framework], list[str]]:
    """The frameworks that are installed, and a note for each that is not."""
    frameworks: dict[str, Framework] = {"paddle": PaddleFramework()}
    if importlib.util.find_spec("torch") is None:
        return frameworks, ["torch is not installed: its baselines were left out"]
    frameworks["torch"] = TorchFramework(threads)
    return frameworks, []
