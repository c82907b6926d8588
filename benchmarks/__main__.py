"""`python -m benchmarks`: an artefact beside its checkpoint, times, and the figures of docs/BENCHMARKS.md."""

from fastvlm.common import start

if __name__ == "__main__":
    start.begin()

import argparse

from fastvlm.common.cli import main
from fastvlm.common.verbs import Verb, room

VERBS = (
    Verb(
        "parity",
        "benchmarks.parity.command:add_parity",
        "compare an artefact with its checkpoint, stage by stage, and write the page",
        "Prove",
    ),
    Verb(
        "mac-report",
        "benchmarks.mac.report:add_parser",
        "run everything that only a Mac can verify, and write one page",
        "Prove",
    ),
    Verb(
        "ttft",
        "benchmarks.ttft.command:add_parser",
        "time to first token: the artefact, Transformers and mlx-vlm side by side",
        "Time",
    ),
    Verb(
        "estimate",
        "benchmarks.estimate.command:add_parser",
        "estimate the time to first token on an Apple device that isn't at hand",
        "Time",
    ),
    Verb(
        "peers",
        "benchmarks.peers.command:add_parser",
        "count parameters, visual tokens and MACs beside the paper's competitors",
        "Time",
    ),
    Verb(
        "export",
        "benchmarks.suites.export:add_parser",
        "measure the export, the executor and the answers against their bars",
        "Benchmarks with bars",
        front="bench-export",
    ),
    Verb(
        "encoder",
        "benchmarks.suites.encoder:add_parser",
        "measure the encoder's range, graph, resolutions and compression against their bars",
        "Benchmarks with bars",
        front="bench-encoder",
    ),
    Verb(
        "quantization",
        "benchmarks.suites.quantization:add_parser",
        "measure conversion beside its peers, calibration and sweeps against their bars",
        "Benchmarks with bars",
        front="bench-quantization",
    ),
    Verb(
        "document",
        "benchmarks.suites.document:add_document",
        "write saved runs of these benchmarks into docs/BENCHMARKS.md",
        "Benchmarks with bars",
        front="bench-document",
    ),
)


def build_parser() -> argparse.ArgumentParser:
    """The command line of the room."""
    return room("python -m benchmarks", "Is an artefact still the model it came from, and what does it cost?", VERBS)


if __name__ == "__main__":
    main(build_parser)
