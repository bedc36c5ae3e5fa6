"""Known schedules: one function of (number of ranks, number of micro-batches) each. To add one, add a function.

The pictures show rank by rank what runs when, if every action takes equally long; `2F0` is stage 2, forward,
micro-batch 0. A schedule stores the order only: the gaps are what follows from it.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from modelpar.errors import ScheduleError
from modelpar.planning.schedule import Columns, Op, Schedule


def gpipe(num_ranks: int, num_microbatches: int) -> Schedule:
    """Returns all forwards, then all backwards: few waits for messages, but every activation is alive at once.

    ::

        0F0 0F1 0F2 0F3                 0B0 0B1 0B2 0B3
            1F0 1F1 1F2 1F3         1B0 1B1 1B2 1B3
                2F0 2F1 2F2 2F3 2B0 2B1 2B2 2B3

    With m micro-batches, p ranks and equal stages a step takes (m + p − 1)(F + B); m micro-batches are alive per rank.
    Backwards ascend, unlike the paper's, so that gradients add up as in the unsplit model.
    Source: Huang et al., GPipe, 2019 (arXiv 1811.06965).

    Raises ScheduleError where there is no rank or no micro-batch.
    """
    return _one_stage_per_rank(num_ranks, num_microbatches, lambda rank, m: "F" * m + "B" * m)


def one_f_one_b(num_ranks: int, num_microbatches: int) -> Schedule:
    """Returns one forward, one backward in turn after a warmup: as fast as `gpipe` with fewer activations alive.

    ::

        0F0 0F1 0F2         0B0 0F3 0B1     0B2     0B3
            1F0 1F1     1B0 1F2 1B1 1F3 1B2     1B3
                2F0 2B0 2F1 2B1 2F2 2B2 2F3 2B3

    With m micro-batches, p ranks and equal stages a step takes (m + p − 1)(F + B); min(m, p − s) micro-batches are
    alive on rank s. Every rank's order is that of torch's Schedule1F1B.
    Source: PipeDream-Flush in Narayanan et al., 2021 (arXiv 2006.09503).

    Raises ScheduleError where there is no rank or no micro-batch.
    """

    def order(rank: int, m: int) -> str:
        warmup = min(m, num_ranks - rank)
        return "F" * warmup + "BF" * (m - warmup) + "B" * warmup

    return _one_stage_per_rank(num_ranks, num_microbatches, order)


def fill_drain(num_ranks: int, num_microbatches: int) -> Schedule:
    """Returns forwards only, for evaluation and prediction.

    ::

        0F0 0F1 0F2 0F3
            1F0 1F1 1F2 1F3
                2F0 2F1 2F2 2F3

    With m micro-batches, p ranks and equal stages it takes (m + p − 1)F.

    Raises ScheduleError where there is no rank or no micro-batch.
    """
    return _one_stage_per_rank(num_ranks, num_microbatches, lambda rank, m: "F" * m, kind="forward")


def _one_stage_per_rank(
    num_ranks: int, num_microbatches: int, order: Callable[[int, int], str], kind: str = "train"
) -> Schedule:
    """Builds a schedule in which rank r runs stage r: order(rank, m) is its ops, each of which ascends."""
    if num_ranks < 1 or num_microbatches < 1:
        raise ScheduleError(
            f"a schedule for {num_ranks} ranks and {num_microbatches} micro-batches; expected at least 1 of each"
        )
    columns = []
    for rank in range(num_ranks):
        letters = np.frombuffer(order(rank, num_microbatches).encode(), dtype=np.uint8)
        op = np.zeros(len(letters), dtype=np.uint8)
        microbatch = np.zeros(len(letters), dtype=np.int32)
        for code, letter in enumerate(Op):
            chosen = letters == ord(letter)
            op[chosen] = code
            microbatch[chosen] = np.arange(np.count_nonzero(chosen))
        columns.append(Columns(np.full(len(op), rank, dtype=np.int32), op, microbatch))
    return Schedule(tuple(columns), kind)
