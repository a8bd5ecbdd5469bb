"""Finding the rank for which the others wait."""

from __future__ import annotations

import logging
import os
import socket
import sys
import threading
import time

from torch import distributed as dist

logger = logging.getLogger(__name__)

EXIT_CODE = 69
"""of a rank that waited in vain for another: EX_UNAVAILABLE"""


class Watch:
    """A thread that ends this process when another rank lets it wait too long, and names that rank.

    Every rank counts the exchanges that it enters and publishes the count. Ranks that wait for another stand at the
    same count; the one that they wait for has a smaller one, whatever keeps it: this works where an exchange blocks
    (gloo) and where the host runs ahead of the device (NCCL). A rank that computes for long by itself, or writes,
    lets the others wait like one that hangs.

    Args:
        store: that all ranks reach.
        rank, world_size: of this process and of all.
        patience: seconds that a rank may wait for another.
    """

    def __init__(self, store: dist.Store, *, rank: int, world_size: int, patience: float) -> None:
        self.entered = 0
        self._store = store
        self._rank = rank
        self._keys = [f"entered-{number}" for number in range(world_size)]
        self._patience = patience
        self._ended = threading.Event()
        self._publish()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._thread.start()

    def end(self) -> None:
        """Watch no longer."""
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        seen, since = self.entered, time.monotonic()
        while not self._ended.wait(min(1.0, self._patience / 4)):
            try:
                self._publish()
                if self.entered != seen:
                    seen, since = self.entered, time.monotonic()
                elif time.monotonic() - since > self._patience:
                    self._look(seen)
            except dist.DistError:  # the store is gone: the ranks are being ended, or the machine that kept it is
                return

    def _publish(self) -> None:
        self._store.set(self._keys[self._rank], f"{self.entered} {socket.gethostname()} {os.getpid()}")

    def _look(self, seen: int) -> None:
        """End this process if a rank has entered fewer exchanges; the first of those that wait says which."""
        ranks = [value.decode().split() for value in self._store.multi_get(self._keys)]
        behind = [number for number, (entered, *_) in enumerate(ranks) if int(entered) < seen]
        if not behind:
            return
        if self._store.add("named", 1) == 1:
            names = ", ".join(f"rank {number} ({ranks[number][1]}, process {ranks[number][2]})" for number in behind)
            logger.error(
                "the other ranks have waited %.0f s for %s (--run.rank-timeout): it hangs, or its machine is gone. "
                "The run ends here; --run.resume auto goes on from its newest checkpoint", self._patience, names,
            )  # fmt: skip
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(EXIT_CODE)  # the main thread is within an exchange, where no exception reaches it
