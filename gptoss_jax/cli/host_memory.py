"""Memory of the host in 2 MiB pages.

XLA takes the temporaries of a program from malloc at every call and gives them back afterwards. For large ones glibc asks the kernel each time,
which clears page after page of 4 KiB: on two cores a training step of 112 M parameters (1.7 GB of temporaries) spent 0.94 of its 3.3 CPU seconds
there, in 2 MiB pages 0.19. glibc reads its settings when a process starts, so a command asks for them by starting itself again.
"""

import os
import sys

HUGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}


def restart_with_huge_pages(arguments: list[str]) -> None:
    """Replaces this process by `python -m gptoss_jax ARGUMENTS` with huge pages, unless it has the setting (or another choice) or is not on Linux.

    Process number, standard streams and working directory stay.
    """
    if sys.platform != "linux" or "GLIBC_TUNABLES" in os.environ:
        return
    os.execve(sys.executable, [sys.executable, "-m", "gptoss_jax", *arguments], {**os.environ, **HUGE_PAGES})
