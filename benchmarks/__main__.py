"""`python -m benchmarks`: an artefact beside its checkpoint, times, and the figures of docs/BENCHMARKS.md."""

from fastvlm.common import start

if __name__ == "__main__":
    start.begin()

from functools import partial

from fastvlm.common.cli import main
from fastvlm.common.verbs import room

build_parser = partial(room, "benchmarks")

if __name__ == "__main__":
    main(build_parser)
