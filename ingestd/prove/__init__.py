"""Proof of durability: a real daemon is killed at random, and the records that it kept are counted.

`prover` starts the daemon again and again and kills it as `plan` decides, while `clients` post
numbered records. The outcomes are kept in a file (`progress`), and in the end compared with the
rows of the sink (`verdict`). `group` does it to several daemons at once, whose journals lie in a
local cluster of NATS (`servers`), and to its nodes.
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

# The setting survives exec.
_BOOT = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGKILL)
os.getppid() == int(sys.argv[1]) or os._exit(1)
os.execvp(sys.argv[2], sys.argv[2:])
"""


def owned(command: Sequence[str]) -> list[str]:
    """Returns a command line whose process dies with the thread that starts it, whatever ends that.

    Args:
        command: path of the program, and its arguments.
    """
    return [sys.executable, "-c", _BOOT, str(os.getpid()), *command]
