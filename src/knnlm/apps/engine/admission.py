"""Which waiting jobs begin: long ones do not keep short ones waiting. Knows jobs and limits."""

from collections import Counter, deque

from knnlm.apps.engine.jobs import Job, Lane
from knnlm.apps.engine.limits import Limits

CALLS_AT_ONCE = 4
"""Model calls in progress; each holds its results until its end."""


def admit(waiting: deque[Job], load: Counter[Lane], limits: Limits) -> list[Job]:
    """Take the jobs that have a place out of the queue, those of each lane in their order.

    load: how many places each lane has taken. Long completions take at most `max_batch` places,
    short ones what is left and, where long ones take or wait for all, a quarter more.
    """
    admitted: list[Job] = []
    blocked: set[Lane] = set()
    load = Counter(load)
    for job in list(waiting):
        if job.lane in blocked or not _has_place(job, load, limits, Lane.long in blocked):
            blocked.add(job.lane)
            continue
        load[job.lane] += job.places
        waiting.remove(job)
        admitted.append(job)
    return admitted


def _has_place(job: Job, load: Counter[Lane], limits: Limits, long_ones_wait: bool) -> bool:
    if job.lane is Lane.call:
        return load[Lane.call] < CALLS_AT_ONCE
    extra = max(1, limits.max_batch // 4)
    if job.lane is Lane.long:
        in_batch = load[Lane.long] + max(load[Lane.short] - extra, 0)
        return in_batch + job.places <= limits.max_batch
    if load[Lane.short] + job.places <= extra:
        return True
    in_batch = load[Lane.long] + load[Lane.short]
    return not long_ones_wait and in_batch + job.places <= limits.max_batch
