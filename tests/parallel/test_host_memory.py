"""Values in host memory: those of a view alone, whatever buffer it lies in."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import paddle
import pytest
from tiny_configs import tiny

from pypkg.models import from_config
from pypkg.models.pretrained import whole_parameter
from pypkg.parallel.host_memory import to_host, use_huge_pages

PACKAGE = Path(__file__).resolve().parents[2] / "pypkg"


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int64"])
def test_values_of_views(dtype):
    whole = paddle.arange(24).astype(dtype).reshape([4, 6])
    expected = whole.numpy()
    for view, cut in (
        (whole[1:3], np.s_[1:3]),
        (whole[2, 3:5], np.s_[2, 3:5]),
        (whole[:, 2], np.s_[:, 2]),
        (whole[3, 3], np.s_[3, 3]),
    ):
        found = to_host(view)
        assert found.dtype == expected.dtype and np.array_equal(found, expected[cut])


def test_nothing_is_copied_on_a_cpu():
    """Not the view, and not the buffer that it lies in."""
    buffer = paddle.zeros([1000])
    values = to_host(buffer[10:20])
    assert values.nbytes == 40 and np.shares_memory(values, to_host(buffer))
    buffer[10] = 3.0
    assert values[0] == 3.0


def test_a_saved_parameter_in_a_fused_buffer_is_not_copied():
    """As ZeRO stages 1 and 2 keep them."""
    model = from_config(tiny("llama"), seed=1)
    name, parameter = next(iter(model.named_parameters()))
    buffer = paddle.zeros([parameter.size + 1000])
    buffer[: parameter.size].reshape(parameter.shape)._share_buffer_to(parameter)
    value = whole_parameter(model.config, name, parameter, writer=0)
    assert np.shares_memory(value, to_host(buffer))


def test_huge_pages_change_no_value():
    tensor = paddle.arange(5 << 20)  # 40 MiB
    use_huge_pages([tensor, paddle.ones([3])])
    assert (to_host(tensor) == np.arange(5 << 20)).all()
    if "[never]" not in Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text():
        assert huge_bytes(tensor.data_ptr()) >= 32 << 20


def huge_bytes(address: int) -> int:
    """Bytes in pages of 2 MiB of the mapping that ``address`` lies in."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if match := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(match[1], 16) <= address < int(match[2], 16)
        elif inside and line.startswith("AnonHugePages:"):
            return int(line.split()[1]) << 10
    raise AssertionError(f"no mapping holds {address:x}")


def test_tensor_numpy_is_called_on_no_view():
    """What Tensor.numpy is called on in these folders is a new tensor, or ``to_host`` itself."""
    called = {
        (path.relative_to(PACKAGE).as_posix(), line.strip())
        for folder in ("parallel", "models", "training/checkpoint")
        for path in (PACKAGE / folder).rglob("*.py")
        for line in path.read_text().splitlines()
        if re.search(r"\.(numpy|tolist)\(\)", line)
    }
    assert {name for name, _ in called} == {"parallel/host_memory.py", "models/generate.py"}, called
