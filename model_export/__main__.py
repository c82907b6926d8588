"""`python -m model_export`: a checkpoint into an artefact, and what to do with an artefact."""

from fastvlm.common import start

if __name__ == "__main__":
    start.begin()

from functools import partial

from fastvlm.common.cli import main
from fastvlm.common.verbs import room

build_parser = partial(room, "model_export")

if __name__ == "__main__":
    main(build_parser)
