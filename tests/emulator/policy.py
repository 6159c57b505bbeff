"""When asynchronous operations complete and which warp runs next: seeded, adversarial choices."""

import random

ENGINES = ("tma_load", "tma_store", "mma", "cp_async", "launch")
MODES = ("eager", "random", "lazy")
LAZY = 10**12


class Policy:
    """How long the operations of each engine take, in scheduler steps, and the order of warps.

    A mode is "eager" (complete at once), "random" (exponential delay with mean `mean`) or "lazy"
    (only when no warp gets on, oldest first within an engine). `mode` is one of these for all
    engines, "mixed" (each drawn from the seed), or a dict by engine. With `priority`, warps run by
    random priorities that change now and then: some starve for long, which reaches interleavings
    that a uniform choice hardly ever does. None draws it from the seed.
    """

    def __init__(self, seed=0, mode="mixed", mean=40, priority=None):
        self.rng = random.Random(seed)
        if isinstance(mode, dict):
            self.mode = {engine: mode.get(engine, "random") for engine in ENGINES}
        elif mode == "mixed":
            self.mode = {engine: self.rng.choice(MODES) for engine in ENGINES}
        else:
            self.mode = dict.fromkeys(ENGINES, mode)
        unknown = set(self.mode.values()) - set(MODES)
        if unknown:
            raise ValueError(
                f"unknown timing mode {unknown.pop()!r}; choose from {MODES} or 'mixed'"
            )
        self.seed, self.mean = seed, mean
        self.priority = self.rng.random() < 0.5 if priority is None else priority
        self.lateness = {
            engine: self.rng.random() for engine in ENGINES
        }  # which lazy engine is the laziest

    def delay(self, engine):
        mode = self.mode[engine]
        if mode == "eager":
            return 0
        if mode == "lazy":
            return LAZY * (1 + self.lateness[engine])
        return self.rng.expovariate(1 / self.mean)

    def __str__(self):
        return (
            f"seed {self.seed}, "
            + ", ".join(f"{e} {m}" for e, m in self.mode.items())
            + (", priorities" if self.priority else "")
        )
