"""The same small work before every round of every run: a change in its time is the machine's, not a runner's."""

import numpy as np

from benchmarks.ttft.runner import State, one_round

_WIDTH, _LAYERS, _PASSES = 512, 16, 5


class Yardstick:
    """Vectors through 16 MB of weights in many small steps, as decoding goes, and as often through one MB of them: the
    former follows how much of the caches others take, the latter how fast the processor is."""

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        self.layers = rng.random((_LAYERS, _WIDTH, _WIDTH), dtype=np.float32)
        self.vector = rng.random(_WIDTH, dtype=np.float32)

    def __call__(self) -> float:
        """The work's seconds, without waiting for a processor."""
        spent, waited = one_round([("work", self._work)], {}, {})
        return spent["work"] - waited["work"]

    def _work(self, state: State) -> None:
        for _ in range(_PASSES):
            for layer in (*self.layers, *[self.layers[0]] * _LAYERS):
                np.einsum("i,ij->j", self.vector, layer)  # not BLAS, whose threads would go on spinning
