"""Makes fleet run on CPU processes that talk over gloo, as it runs on GPUs over NCCL.

Paddle 3.3.1 trains on several CPU processes in the simplest layouts only. Each module beside this
one mends one thing, for gloo's process groups and CPU tensors alone; nothing of it is reachable
when groups are NCCL's:

- groups.py: several groups in one run.
- collectives.py: the collectives that gloo lacks, and sums of float16.
- p2p.py: messages between pipeline stages.
- mpu.py: operators of tensor-parallel layers without a CPU kernel.
- devices.py: code that insists on a GPU.

What stays: an operation in which a rank waits for another for more than 30 seconds fails, a limit
inside gloo's binding that Paddle does not let anyone set.
"""

from __future__ import annotations

import paddle

from pypkg.errors import UserError

# They replace methods that Paddle does not promise to keep.
SUPPORTED = ("3.3",)
_is_installed = False


def install() -> None:
    """To be called before fleet is started; calling it again changes nothing.

    Raises:
        UserError: this Paddle is another one than the adapter was written for.
    """
    global _is_installed
    if _is_installed:
        return
    version = paddle.__version__
    if not version.startswith(tuple(f"{each}." for each in SUPPORTED)):
        raise UserError(
            f"several CPU processes need Paddle {' or '.join(SUPPORTED)}, whose gloo groups are "
            f"completed here, and this is Paddle {version}; install that one, or run in one process"
        )
    from pypkg.parallel.gloo import collectives, devices, groups, mpu, p2p

    groups.install(p2p.install())
    collectives.install()
    mpu.install()
    devices.install()
    _is_installed = True
