"""Makes the .bin files here with torch, and what they hold as safetensors.

Written by torch 2.13; run in this folder: ``python make_fixtures.py``. The tests need no torch.
"""

from collections import OrderedDict

import torch
from safetensors.torch import save_file

torch.manual_seed(0)
whole = torch.randn(6, 4)
tensors = {
    "float32": torch.randn(3, 5),
    "float16": torch.randn(4).half(),
    "bfloat16": torch.randn(2, 3).bfloat16(),
    "float64": torch.randn(2, 2, dtype=torch.float64),
    "parameter": torch.nn.Parameter(torch.randn(2, 3)),
    "scalar": torch.tensor(2.5),
    "empty": torch.zeros(0, 3),
    "transposed": torch.randn(5, 3).T,
    "view": whole[2:5, 1:3],
    "same_storage": whole,
    "expanded": torch.randn(1, 3).expand(4, 3),
    "permuted": torch.randn(2, 3, 4).permute(2, 0, 1),
    "mask": torch.tensor([[True, False], [True, True]]),
    "positions": torch.arange(4),
}
state_dict = OrderedDict(tensors)
state_dict._metadata = OrderedDict({"": {"version": 1}})  # as torch.nn.Module.state_dict leaves it
torch.save(state_dict, "state_dict.bin")
torch.save(state_dict, "legacy.bin", _use_new_zipfile_serialization=False)
torch.save(
    {"module": {"weight": tensors["float32"]}, "iteration": 7, "args": [1.5, None, ("a", "b")]},
    "wrapped.bin",
)
torch.save({"w": tensors["float32"], "dtype": torch.float16, "size": torch.Size([2])}, "mixed.bin")
torch.save(torch.nn.Linear(2, 2), "module.bin")
save_file(
    {name: value.detach().clone().contiguous() for name, value in tensors.items()},
    "state_dict.safetensors",
)
