"""Who is named when a rank hangs; the rest of the watch is in test_distributed.py."""

import subprocess
import sys

from mcic.watch import EXIT_CODE

WAITING = """
import sys, time
from torch import distributed as dist
from mcic.watch import Watch

store, impatient = dist.HashStore(), int(sys.argv[1])
watches = [Watch(store, rank=rank, world_size=4, patience=3.0 if rank == impatient else 1e9) for rank in range(4)]
for rank, watch in enumerate(watches):
    watch.entered = 5 if rank == 2 else 6
time.sleep(30)
"""


def test_the_hung_rank_is_named_whoever_loses_patience_first():
    ranks = {
        rank: subprocess.Popen([sys.executable, "-c", WAITING, str(rank)], stderr=subprocess.PIPE, text=True)
        for rank in (0, 3)
    }
    for rank, process in ranks.items():
        _, said = process.communicate(timeout=60)
        assert process.returncode == EXIT_CODE, rank
        assert "have waited 3 s for rank 2 (" in said, rank
        assert "rank 1 (" not in said
