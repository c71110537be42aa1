"""How this process gets memory from the operating system: what XLA:CPU's speed depends on more than on any of its flags."""

from __future__ import annotations

import ctypes
import sys

# mallopt's names for its parameters (malloc.h).
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8


def keep_freed_memory() -> bool:
    """Lets this process reuse the memory that it frees, instead of giving it back and faulting it in again page by page.

    XLA:CPU allocates the results and temporaries of every program anew. By default glibc maps large blocks afresh each time, and
    the kernel then zeroes every page of them: on a training step that costs about a quarter of the CPU time. Here freed memory
    stays with the process, in one arena that all threads share (in the other arenas it would be given back all the same). The
    process holds on to its peak use. Call it before JAX starts its threads.

    Returns:
      Whether it was done; False where the C library is not glibc.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return False
    return all([mallopt(_MMAP_MAX, 0), mallopt(_TRIM_THRESHOLD, -1), mallopt(_ARENA_MAX, 1)])
