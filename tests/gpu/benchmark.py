"""A first benchmark of every kernel against the best that torch offers, in bfloat16.

A case knows its inputs, how ours is run (in CUDA, and in Triton where there is such a kernel),
peers that compute the same, and how much work it is: bytes (each input read once, each output
written once) or floating-point operations. What is timed is validated first, at the timed shape.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from hopper_cases import flash_attention_kernel
from torch.nn.attention import SDPBackend, sdpa_kernel

DTYPE = torch.bfloat16
# Both sides round to bfloat16, ours and the peer, at different places.
ALLOWED_DIFFERENCE = 2e-2

Tensors = tuple[torch.Tensor, ...]


@dataclass
class BenchmarkCase:
    name: str
    shape: str
    ours: Callable[[], Tensors]
    peers: dict[str, Callable[[], Tensors]]
    work: float  # bytes, or floating-point operations
    unit: str  # "GB/s" or "TFLOP/s"
    triton: Callable[[], Tensors] | None = None
    notes: list[str] = field(default_factory=list)


def address(tensor: torch.Tensor) -> tuple[int, tuple[int, ...], str, str]:
    """A contiguous tensor as a kernel argument that costs little host time."""
    assert tensor.is_contiguous()
    dtype = str(tensor.dtype).removeprefix("torch.")
    return tensor.data_ptr(), tuple(tensor.shape), dtype, tensor.device.type


class Maker:
    """Tensors on the device, and calls of kernels with them."""

    def __init__(self, kernels: Any, triton: Any | None, device: str):
        self.kernels, self.triton, self.device = kernels, triton, device
        self.generator = torch.Generator(device).manual_seed(0)

    def random(self, *shape: int) -> torch.Tensor:
        x = torch.randn(*shape, device=self.device, generator=self.generator)
        return x.to(DTYPE)

    def empty(self, *shape: int, dtype: torch.dtype = DTYPE) -> torch.Tensor:
        return torch.full(shape, float("nan"), dtype=dtype, device=self.device)

    def call(self, name: str, *tensors: torch.Tensor | None, **settings: Any) -> Callable[[], None]:
        kernel = getattr(self.kernels, name)
        arguments = [None if t is None else address(t) for t in tensors]
        stream = torch.cuda.current_stream().cuda_stream if self.device == "cuda" else 0

        def run(_alive: tuple = tensors) -> None:
            kernel(*arguments, stream=stream, **settings)

        return run

    def call_triton(
        self, name: str, *tensors: torch.Tensor | None, **settings: Any
    ) -> Callable[[], None] | None:
        if self.triton is None:
            return None
        kernel = getattr(self.triton, name)
        return lambda: kernel(*tensors, **settings)

    def compiled(self, function: Callable[..., Any]) -> Callable[..., Any]:
        return torch.compile(function, dynamic=False)


def gradients(
    make_output: Callable[[], torch.Tensor], inputs: Tensors, dout: torch.Tensor
) -> Callable[[], Tensors]:
    """Runs torch's backward alone, but for the first call."""
    output: list[torch.Tensor] = []

    def run() -> Tensors:
        if not output:
            output.append(make_output())
        return torch.autograd.grad(output[0], inputs, dout, retain_graph=True)

    return run


def rms_norm(mk: Maker, rows: int, cols: int, use_compile: bool) -> Iterator[BenchmarkCase]:
    epsilon, shape = 1e-6, f"{rows}x{cols}"
    x, r, weight = mk.random(rows, cols), mk.random(rows, cols), mk.random(cols)
    y, h, rstd = mk.empty(rows, cols), mk.empty(rows, cols), mk.empty(rows, dtype=torch.float32)
    matrix = x.numel() * x.element_size()

    def plain(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, (cols,), weight, epsilon)

    def fused(x: torch.Tensor, r: torch.Tensor, weight: torch.Tensor) -> Tensors:
        h = x + r
        return plain(h, weight), h

    forward = mk.call("rms_norm_forward", x, weight, y, rstd, epsilon=epsilon)
    forward_triton = mk.call_triton("rms_norm_forward", x, weight, y, rstd, epsilon=epsilon)
    peers = {"F.rms_norm": lambda: (plain(x, weight),)}
    compiled_plain = mk.compiled(plain)
    if use_compile:
        peers["torch.compile"] = lambda: (compiled_plain(x, weight),)
    yield BenchmarkCase(
        *("rms_norm fwd", shape, _then(forward, y), peers, 2 * matrix, "GB/s"),
        _then(forward_triton, y),
    )

    arguments = (x, weight, y, rstd, r, h)
    add = mk.call("rms_norm_forward", *arguments, epsilon=epsilon)
    add_triton = mk.call_triton("rms_norm_forward", *arguments, epsilon=epsilon)
    peers = {"add, F.rms_norm": lambda: fused(x, r, weight)}
    if use_compile:
        compiled_fused = mk.compiled(fused)
        peers["torch.compile"] = lambda: compiled_fused(x, r, weight)
    yield BenchmarkCase(
        *("add + rms_norm fwd", shape, _then(add, y, h), peers, 4 * matrix, "GB/s"),
        _then(add_triton, y, h),
    )

    forward()  # rstd of x
    dy, dx, dweight = mk.random(rows, cols), mk.empty(rows, cols), mk.empty(cols)
    floats = mk.kernels.rms_norm_backward_workspace(address(x))
    workspace = mk.empty(floats, dtype=torch.float32)
    arguments = (dy, x, weight, rstd, dx, dweight)
    backward = mk.call("rms_norm_backward", *arguments, workspace)
    backward_triton = None
    if mk.triton:
        workspace = mk.empty(mk.triton.rms_norm_backward_workspace(x), dtype=torch.float32)
        backward_triton = mk.call_triton("rms_norm_backward", *arguments, workspace)
    xg, wg = x.detach().requires_grad_(), weight.detach().requires_grad_()
    peers = {"F.rms_norm": gradients(lambda: plain(xg, wg), (xg, wg), dy)}
    if use_compile:
        peers["torch.compile"] = gradients(lambda: compiled_plain(xg, wg), (xg, wg), dy)
    yield BenchmarkCase(
        *("rms_norm bwd", shape, _then(backward, dx, dweight), peers, 3 * matrix, "GB/s"),
        _then(backward_triton, dx, dweight),
    )


def rotary(mk: Maker, tokens: int, heads: tuple[int, int], use_compile: bool) -> BenchmarkCase:
    head_dim = 128
    q, k = (mk.random(1, tokens, count, head_dim) for count in heads)
    angles = torch.rand(tokens, head_dim // 2, device=mk.device) * 6
    cos, sin = angles.cos(), angles.sin()

    def turn(x: torch.Tensor) -> torch.Tensor:
        a, b = x.float().chunk(2, -1)
        c, s = cos[None, :, None], sin[None, :, None]
        return torch.cat((a * c - b * s, b * c + a * s), -1).to(x.dtype)

    def both(q: torch.Tensor, k: torch.Tensor) -> Tensors:
        return turn(q), turn(k)

    outputs = torch.empty_like(q), torch.empty_like(k)
    arguments = ("rotary_embedding", q, k, cos, sin, *outputs)
    peers = {"eager": lambda: both(q, k)}
    if use_compile:
        compiled = mk.compiled(both)
        peers["torch.compile"] = lambda: compiled(q, k)
    work = 2 * (q.numel() + k.numel()) * q.element_size()
    shape = f"{tokens}x{heads[0]}+{heads[1]}x{head_dim}"
    ours, triton = mk.call(*arguments), mk.call_triton(*arguments)
    return BenchmarkCase(
        *("rotary_embedding", shape, _then(ours, *outputs), peers, work, "GB/s"),
        _then(triton, *outputs),
    )


def swiglu(mk: Maker, rows: int, cols: int, use_compile: bool) -> Iterator[BenchmarkCase]:
    gate, up, dout = (mk.random(rows, cols) for _ in range(3))
    out, dgate, dup = (mk.empty(rows, cols) for _ in range(3))
    matrix, shape = gate.numel() * gate.element_size(), f"{rows}x{cols}"

    def plain(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        return F.silu(gate) * up

    compiled = mk.compiled(plain)
    arguments = ("gated_activation_forward", gate, up, out)
    ours, triton = mk.call(*arguments), mk.call_triton(*arguments)
    peers = {"eager": lambda: (plain(gate, up),)}
    if use_compile:
        peers["torch.compile"] = lambda: (compiled(gate, up),)
    yield BenchmarkCase(
        *("swiglu fwd", shape, _then(ours, out), peers, 3 * matrix, "GB/s"), _then(triton, out)
    )

    arguments = ("gated_activation_backward", gate, up, dout, dgate, dup)
    ours, triton = mk.call(*arguments), mk.call_triton(*arguments)
    leaves = gate.detach().requires_grad_(), up.detach().requires_grad_()
    peers = {"eager": gradients(lambda: plain(*leaves), leaves, dout)}
    if use_compile:
        peers["torch.compile"] = gradients(lambda: compiled(*leaves), leaves, dout)
    yield BenchmarkCase(
        *("swiglu bwd", shape, _then(ours, dgate, dup), peers, 5 * matrix, "GB/s"),
        _then(triton, dgate, dup),
    )


def cross_entropy(mk: Maker, rows: int, cols: int, use_compile: bool) -> Iterator[BenchmarkCase]:
    logits, shape = mk.random(rows, cols), f"{rows}x{cols}"
    labels = torch.randint(cols, (rows,), device=mk.device, generator=mk.generator)
    loss, lse = (mk.empty(rows, dtype=torch.float32) for _ in range(2))
    dloss = torch.rand(rows, device=mk.device, generator=mk.generator)
    dlogits, matrix = mk.empty(rows, cols), logits.numel() * logits.element_size()

    def plain(logits: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(logits.float(), labels, reduction="none")

    compiled = mk.compiled(plain)
    arguments = ("cross_entropy_forward", logits, labels, loss, lse)
    ours, triton = mk.call(*arguments), mk.call_triton(*arguments)
    peers = {"F.cross_entropy": lambda: (plain(logits),)}
    if use_compile:
        peers["torch.compile"] = lambda: (compiled(logits),)
    yield BenchmarkCase(
        *("cross_entropy fwd", shape, _then(ours, loss), peers, matrix, "GB/s"), _then(triton, loss)
    )

    ours()  # lse
    arguments = ("cross_entropy_backward", logits, labels, lse, dloss, dlogits)
    ours, triton = mk.call(*arguments), mk.call_triton(*arguments)
    leaf = logits.detach().requires_grad_()
    peers = {"F.cross_entropy": gradients(lambda: plain(leaf), (leaf,), dloss)}
    if use_compile:
        peers["torch.compile"] = gradients(lambda: compiled(leaf), (leaf,), dloss)
    yield BenchmarkCase(
        *("cross_entropy bwd", shape, _then(ours, dlogits), peers, 2 * matrix, "GB/s"),
        _then(triton, dlogits),
    )


def attention(
    mk: Maker, batch: int, sequence: int, heads: tuple[int, int], head_dim: int, causal: bool
) -> Iterator[BenchmarkCase]:
    shape = f"{batch}x{sequence}x{heads[0]}/{heads[1]}x{head_dim}" + (" causal" if causal else "")
    q, k, v, dout = (
        mk.random(batch, sequence, count, head_dim)
        for count in (heads[0], *heads[1:] * 2, heads[0])
    )
    out, lse = torch.empty_like(q), mk.empty(batch, heads[0], sequence, dtype=torch.float32)
    settings = {"scale": head_dim**-0.5, "causal": causal}
    work = 4 * batch * heads[0] * sequence**2 * head_dim * (0.5 if causal else 1)

    def peer(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, backend: SDPBackend) -> Any:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(
                *(x.transpose(1, 2) for x in (q, k, v)),
                is_causal=causal,
                enable_gqa=heads[0] != heads[1],
            ).transpose(1, 2)

    cuda = mk.device == "cuda"
    backends = [SDPBackend.FLASH_ATTENTION, *([SDPBackend.CUDNN_ATTENTION] if cuda else [])]
    names = {backend: f"SDPA {backend.name.split('_')[0].lower()}" for backend in backends}
    forward = mk.call("flash_attention_forward", q, k, v, out, lse, **settings)
    peers = {names[b]: lambda b=b: (peer(q, k, v, b),) for b in backends}
    yield BenchmarkCase("attention fwd", shape, _then(forward, out), peers, work, "TFLOP/s")
    if has_hopper_kernels(mk.device):

        def on_hopper() -> None:
            with flash_attention_kernel("hopper"):
                forward()

        yield BenchmarkCase(
            "attention fwd sm_90", shape, _then(on_hopper, out), peers, work, "TFLOP/s"
        )

    forward()
    grads = [torch.empty_like(x) for x in (q, k, v)]
    floats = mk.kernels.flash_attention_backward_workspace(address(q), address(k))
    workspace = mk.empty(floats, dtype=torch.float32)
    backward = mk.call(
        "flash_attention_backward", dout, q, k, v, out, lse, *grads, workspace, **settings
    )
    leaves = tuple(x.detach().requires_grad_() for x in (q, k, v))
    peers = {names[b]: gradients(lambda b=b: peer(*leaves, b), leaves, dout) for b in backends}
    yield BenchmarkCase(
        "attention bwd", shape, _then(backward, *grads), peers, 2.5 * work, "TFLOP/s"
    )


def has_hopper_kernels(device: str) -> bool:
    return device == "cuda" and torch.cuda.get_device_capability() == (9, 0)


def _then(run: Callable[[], None] | None, *results: torch.Tensor) -> Any:
    """A call of run that returns the tensors it fills; None without run."""
    if run is None:
        return None

    def call() -> Tensors:
        run()
        return results

    return call


def cases(
    kernels: Any, triton: Any | None, device: str, use_compile: bool
) -> Iterator[BenchmarkCase]:
    """Sizes of a 7B model's layer on a GPU, tiny ones on a CPU (to try the script out)."""
    mk = Maker(kernels, triton, device)
    if device == "cpu":
        yield from rms_norm(mk, 64, 256, use_compile)
        yield rotary(mk, 32, (4, 2), use_compile)
        yield from swiglu(mk, 64, 256, use_compile)
        yield from cross_entropy(mk, 32, 1000, use_compile)
        yield from attention(mk, 1, 64, (4, 2), 64, True)
        return
    yield from rms_norm(mk, 8192, 4096, use_compile)
    yield rotary(mk, 8192, (32, 8), use_compile)
    yield from swiglu(mk, 8192, 11008, use_compile)
    yield from cross_entropy(mk, 8192, 32000, use_compile)
    yield from cross_entropy(mk, 4096, 128256, use_compile)
    yield from attention(mk, 4, 4096, (32, 32), 128, True)
    yield from attention(mk, 4, 4096, (32, 8), 128, True)
    yield from attention(mk, 2, 8192, (32, 32), 128, True)
    yield from attention(mk, 4, 4096, (32, 32), 128, False)
    yield from attention(mk, 4, 4096, (32, 32), 64, True)


def validate(case: BenchmarkCase, expected: Tensors) -> float:
    """Largest relative difference (2-norm) between a version of ours and a peer's tensors."""
    worst = 0.0
    for version, run in (("CUDA", case.ours), ("Triton", case.triton)):
        if run is None:
            continue
        for tensor in run():
            tensor.fill_(float("nan"))  # both versions write to the same tensors
        for ours, theirs in zip(run(), expected):
            difference = (ours.double() - theirs.double()).norm() / theirs.double().norm()
            if not difference <= ALLOWED_DIFFERENCE:
                where = f"{case.name} {case.shape}, {version}"
                raise AssertionError(f"{where}: off by {difference:.2e}")
            worst = max(worst, float(difference))
    return worst


def measure(case: BenchmarkCase, timer: Any, limits: dict[str, float]) -> dict[str, Any]:
    """One row of the table; raises AssertionError if ours and a peer disagree."""
    times, difference = {}, None
    for name, run in case.peers.items():
        try:
            expected = run()
        except Exception as error:  # a peer may be missing on this GPU or in this torch
            case.notes.append(f"{name}: {str(error).splitlines()[0][:200]}")
            continue
        difference = validate(case, expected)
        del expected
        times[name] = timer.median(run)
    ours = timer.median(case.ours)
    triton = timer.median(case.triton) if case.triton else None
    best = min(times, key=times.get) if times else None
    scale = 1e9 if case.unit == "GB/s" else 1e12
    rate = case.work / ours / scale
    return {
        "name": case.name,
        "shape": case.shape,
        "ours_us": ours * 1e6,
        "triton_us": triton * 1e6 if triton else None,
        "peer": best,
        "peer_us": times[best] * 1e6 if best else None,
        "all_peers_us": {name: t * 1e6 for name, t in times.items()},
        "speedup": times[best] / ours if best else None,
        "rate": rate,
        "unit": case.unit,
        "share_of_limit": rate * scale / limits[case.unit],
        "difference": difference,
        "notes": case.notes,
    }
