"""`python -m app_bridge`: an artefact into an app."""

from fastvlm.common import start

if __name__ == "__main__":
    start.begin()

from functools import partial

from fastvlm.common.cli import main
from fastvlm.common.verbs import room

build_parser = partial(room, "app_bridge")

if __name__ == "__main__":
    main(build_parser)
