"""What a run will take, before it starts: `--dry-run`, `--plan` and `--suggest` of launchers/pretrain.py.

    memory.py        Which tensors does a rank hold between steps?                    exact
    activations.py   What is kept from the forward to the backward?                   exact on a CPU, else an estimate
    footprint.py     How much memory is that at the fullest moment of a step?         estimate
    traffic.py       How many bytes does a rank send?                                 exact for what a run counts
    arithmetic.py    How many FLOPs, and what can a device do?
    speed.py         How long does a step take?                                       from measurements
    suggest.py       Which layouts fit, and which is the fastest?
    report.py        All of it as text

Nothing here imports torch: a plan for 512 GPUs is made on a login node, in a second.
"""

from dqt_dist.plan.memory import RankBytes, RankWeights, largest_rank, rank_bytes

__all__ = ["RankBytes", "RankWeights", "largest_rank", "rank_bytes"]
