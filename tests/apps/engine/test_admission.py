"""Who begins: every lane in its order, within its places, and short ones beside long ones."""

import random
from collections import Counter, deque

from knnlm.apps.engine.admission import CALLS_AT_ONCE, admit
from knnlm.apps.engine.jobs import Completion, Job, Lane, ModelCall, Overrides
from knnlm.apps.engine.limits import Limits
from knnlm.apps.engine.turns import Turns
from knnlm.knn_lm import KNNLM


def nothing(model: KNNLM) -> Turns[None]:
    yield


def call() -> Job:
    return ModelCall(print, Overrides(), nothing)


def completion(max_tokens: int = 100, samples: int = 1, prompt: int = 5) -> Job:
    return Completion(print, Overrides(), [1] * prompt, 1, max_tokens, samples=samples)


def test_lanes() -> None:
    assert call().lane is Lane.call
    assert completion(16).lane is Lane.short
    for long_one in (completion(17), completion(16, samples=2), completion(1, prompt=300)):
        assert long_one.lane is Lane.long


def made_job(chosen: random.Random, limits: Limits) -> Job:
    if chosen.random() < 0.2:
        return call()
    samples = chosen.choice([1, 1, 1, chosen.randint(1, limits.max_batch)])
    return completion(chosen.choice([1, 16, 17, 200]), samples, chosen.choice([3, 256, 257]))


def test_any_queue() -> None:
    chosen = random.Random(0)
    for _ in range(200):
        limits = Limits(max_batch=chosen.randint(1, 20))
        running: list[Job] = []
        waiting: deque[Job] = deque()
        arrived: list[Job] = []
        begun: list[Job] = []
        for turn in range(300):
            if turn < 60:
                new = [made_job(chosen, limits) for _ in range(chosen.randrange(4))]
                waiting.extend(new)
                arrived += new
            load: Counter[Lane] = Counter()
            for job in running:
                load[job.lane] += job.places
            admitted = admit(waiting, load, limits)
            running += admitted
            begun += admitted
            places = Counter(dict.fromkeys(Lane, 0))
            for job in running:
                places[job.lane] += job.places
            extra = max(1, limits.max_batch // 4)
            assert places[Lane.call] <= CALLS_AT_ONCE
            assert places[Lane.long] <= limits.max_batch
            assert places[Lane.long] + places[Lane.short] <= limits.max_batch + extra
            short_waits = any(job.lane is Lane.short for job in waiting)
            assert not short_waits or places[Lane.short] >= extra, "long ones kept it waiting"
            running = [job for job in running if chosen.random() < 0.7]
        assert not waiting, "nobody waits for ever"
        for lane in Lane:
            wanted = [job for job in arrived if job.lane is lane]
            assert [job for job in begun if job.lane is lane] == wanted
