"""The file that ``python -m paddle.distributed.launch`` wants: the same as -m pypkg.pretrain."""

import sys

from pypkg.pretrain import main

if __name__ == "__main__":
    sys.exit(main())
