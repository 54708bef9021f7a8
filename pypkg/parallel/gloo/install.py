"""Makes fleet run on CPU processes over gloo as it runs on GPUs over NCCL.

Paddle 3.3.1 alone supports only the simplest layouts on several CPU processes. Each module of this
subpackage repairs one part, for gloo's process groups and CPU tensors.

- groups.py: several groups in one run.
- collectives.py: the collectives that gloo lacks, and sums of float16.
- interface.py: groups over several hosts.
- p2p.py: messages between pipeline stages.
- mpu.py: operators of tensor-parallel layers without a CPU kernel.
- devices.py: code of fleet that requires a GPU.

One limit remains: an operation fails if a rank waits in it for another rank for more than 30
seconds. This time is a constant in Paddle's binding of gloo.
"""

from __future__ import annotations

import paddle

from pypkg.errors import UserError

# Versions of Paddle that the modules were written for. They replace private methods of Paddle.
SUPPORTED = ("3.3",)
_is_installed = False


def install() -> None:
    """Installs all modules. It must be called before fleet starts. A second call has no effect.

    Raises:
        UserError: the adapter was not written for this version of Paddle, or this rank's endpoint
            is not an address of this machine.
    """
    global _is_installed
    if _is_installed:
        return
    version = paddle.__version__
    if not version.startswith(tuple(f"{each}." for each in SUPPORTED)):
        raise UserError(
            f"several CPU processes need Paddle {' or '.join(SUPPORTED)}, because pypkg replaces "
            f"methods of its gloo groups, and this is Paddle {version}; install that one, or run "
            "in one process"
        )
    from pypkg.parallel.gloo import collectives, devices, groups, interface, mpu, p2p

    interface.choose_interface()
    groups.install(p2p.install())
    collectives.install()
    mpu.install()
    devices.install()
    _is_installed = True
