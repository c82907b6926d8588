"""`python -m quantization`: recipes, and which of them to ship."""

from fastvlm.common import start

if __name__ == "__main__":
    start.begin()

from functools import partial

from fastvlm.common.cli import main
from fastvlm.common.verbs import room

build_parser = partial(room, "quantization")

if __name__ == "__main__":
    main(build_parser)
