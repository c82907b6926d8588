"""`fastvlm mac-report`: everything that only a Mac can verify, on one page.

The checks are a table (mac_checks.json): what each establishes, the command that it runs, what counts as passed. Each
is a process of its own, because Core ML and Metal can end the process that calls them (coremltools #2757, #2758).
"""

import argparse
import json
import math
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.text import Text

from benchmarks import checks, environment
from benchmarks.checks import Check
from benchmarks.environment import output_of
from benchmarks.mac import check as mac_check
from benchmarks.suites.suite import DEMO
from benchmarks.ttft.report import shown
from fastvlm.common import page
from fastvlm.common.children import ROOT
from fastvlm.common.cli import log, progress
from fastvlm.common.errors import UserError
from fastvlm.common.files import Output
from fastvlm.common.staging import write_file
from fastvlm.common.terminal import mark, print_table
from model_export.coreai.packages import check_installed
from model_export.coreai.process import has_system_runtime

TABLE = Path(__file__).with_name("mac_checks.json")
TEMPLATE = Path(__file__).parent / "templates" / "mac_report.html.j2"
MAC = ("Core ML", "Metal", "Xcode", "macOS", "Core AI")  # of what checks need, what only a Mac has
OUTCOMES: dict[str, str | Text] = {"passed": mark(True), "failed": mark(False), "skipped": mark(None), "by hand": "☞"}
_LARGEST = 1 << 20  # characters of a check's JSON document that the page keeps


def add_parser(subparsers: Any) -> None:
    """Add the verb `mac-report`."""
    text = "Run everything that only a Mac can verify, and write one page (elsewhere: what each check would establish)."
    parser = subparsers.add_parser("mac-report", description=text)
    parser.add_argument("--model", type=Path, metavar="ARTEFACT", help="default: --checkpoint, exported first")
    parser.add_argument(
        "--checkpoint",
        type=Path,
        metavar="FOLDER",
        help="the reference (default: the demo checkpoint; with --model there is no comparison unless this is given)",
    )
    parser.add_argument("--check", nargs="+", metavar="NAME", help="only these rows of the page, by their names")
    parser.add_argument(
        "--output", type=Output(), default=Path("build/mac-report.html"), metavar="FILE", help="(default: %(default)s)"
    )
    parser.set_defaults(run=run_mac_report)


def run_mac_report(args: argparse.Namespace) -> dict[str, Any]:
    """Run the checks, print the table, write the page. "passed" is False when one failed, None when none ran."""
    table, places, missing = _chosen(checks.load(TABLE), args.check), _places(args), absent(args)
    before = environment.load()
    rows: list[dict[str, Any]] = []
    for number, check in enumerate(table, 1):
        place = f"{number}/{len(table)} {check.name}"
        if why := _why_not(check, places, missing, rows):
            rows.append(_row(check, "skipped", why))
        elif check.steps:
            steps = [checks.filled(step, places) for step in check.steps]
            rows.append(_row(check, "by hand", check.passes) | {"steps": steps})
        else:
            with progress(f"{place}, at most {check.seconds / 60:.0f} minutes"):
                rows.append(_ran(check, places))
            log(f"{place}: {rows[-1]['outcome']}: {rows[-1]['reason']}")
    outcomes = [row["outcome"] for row in rows]
    document = {
        "passed": "failed" not in outcomes if {"passed", "failed"} & set(outcomes) else None,
        "counts": {outcome: outcomes.count(outcome) for outcome in OUTCOMES},
        "checks": rows,
        "times": times(rows),
        "beside": beside(rows),
        "environment": environment.describe() | mac(),
        "load_before": before,
        "load_after": environment.load(),
        "command": shlex.join(["fastvlm", *sys.argv[1:]]),
    }
    document = _without_home(document)
    write_file(args.output, render(document).encode())
    if not args.json:
        print_document(document)
    log(f"page: {args.output}")
    return document


def _without_home(document: dict[str, Any]) -> dict[str, Any]:
    """The document with `~` for the user's folder: it is sent to others."""
    home = json.dumps(str(Path.home()))[1:-1]
    return json.loads(json.dumps(document).replace(home, "~")) if len(home) > 1 else document


def _chosen(table: Sequence[Check], names: Sequence[str] | None) -> list[Check]:
    """The named checks, and those that make what they read."""
    known = [check.name for check in table]
    if unknown := sorted(set(names or ()) - set(known)):
        raise UserError(f"--check: got {', '.join(unknown)}, expected some of {', '.join(known)}")
    return checks.chosen(table, names or known)


def _places(args: argparse.Namespace) -> dict[str, str]:
    """The values of the places in the commands. UserError for a path that can't be used."""
    if args.output.is_dir():
        raise UserError(f"--output {args.output}: is a folder; expected a file to write")
    work = args.output.expanduser().resolve().with_suffix("")
    checkpoint = (args.checkpoint or DEMO).expanduser().resolve()
    if not (checkpoint / "config.json").is_file():
        raise UserError(f"--checkpoint {args.checkpoint}: no config.json there; expected a checkpoint's folder")
    if args.model is not None:
        from model_export import artefact

        folder = args.model.expanduser()
        artefact.check_parts(folder, artefact.read_whole(folder))
    made = work / "artefact" if args.model is None else args.model.expanduser().resolve()
    paths = {"root": ROOT, "work": work, "artefact": made, "checkpoint": checkpoint}
    return {name: str(path) for name, path in paths.items()} | {"device": known_device() or ""}


def absent(args: argparse.Namespace) -> dict[str, str]:
    """The reason why a requirement of checks is missing on this machine, by its name; a Mac comes first."""
    missing = {}
    if known_device() is None:
        missing["device"] = f"devices.json has no Mac with {environment.describe()['cpu']}"
    if sys.platform != "darwin":
        missing = {need: f"needs a Mac ({need}), this is {sys.platform}" for need in MAC} | missing
    elif not output_of("xcrun", "--find", "coremlcompiler"):
        missing["Xcode"] = "needs Xcode (the app: its command line tools alone have no coremlcompiler)"
    if sys.platform == "darwin" and (why := _no_core_ai()):
        missing["Core AI"] = why
    if args.model is not None:
        missing["no --model"] = "--model was given"
        if args.checkpoint is None:
            missing["checkpoint"] = "--checkpoint was not given, and what the artefact was made from is not in it"
    return missing


def _no_core_ai() -> str:
    """The reason why this Mac has no Core AI; empty where it has."""
    if not has_system_runtime():
        return "needs macOS 27, whose Core AI is part of the system"
    try:
        check_installed()
    except UserError as error:
        return str(error)
    return ""


def known_device() -> str | None:
    """This Mac's key in devices.json, by its chip's name; None when it isn't there."""
    from benchmarks.estimate.devices import devices

    chip = environment.describe()["cpu"].removeprefix("Apple ")
    return next((key for key, device in devices().items() if (device.kind, device.chip) == ("mac", chip)), None)


def _why_not(
    check: Check, places: Mapping[str, str], missing: Mapping[str, str], rows: Sequence[Mapping[str, Any]]
) -> str:
    """The reason not to run a check; empty where it runs."""
    if why := next((text for need, text in missing.items() if need in check.needs), ""):
        return why
    if failed := {*check.after} & {row["name"] for row in rows if row["outcome"] == "failed"}:
        return f"{', '.join(failed)} failed, so there is nothing to look at"
    return f"{checks.filled(check.makes, places)} is there from an earlier run" if checks.is_made(check, places) else ""


# Running


def _ran(check: Check, places: Mapping[str, str]) -> dict[str, Any]:
    Path(places["work"]).mkdir(parents=True, exist_ok=True)
    command = checks.words(check.command, places)
    outcome = mac_check.run(command, check.seconds)
    document, fault = outcome.document, mac_check.judge(check, outcome)
    shown = {label: text for label, path, unit in check.figures if (text := mac_check.shown(document, path, unit))}
    return _row(check, "failed" if fault else "passed", fault or check.passes) | {
        "figures": shown,
        "seconds": round(outcome.done.seconds, 1),
        "command": shlex.join(["python" if word == sys.executable else word for word in command]),
        "stdout": outcome.stdout,
        "stderr": outcome.stderr,
        "document": document if len(json.dumps(document)) <= _LARGEST else None,
    }


def _row(check: Check, outcome: str, reason: str) -> dict[str, Any]:
    """A check as the page has it; what only one that ran has is empty."""
    about = {key: getattr(check, key) for key in ("name", "part", "title", "establishes", "command")}
    empty: dict[str, Any] = {"figures": {}, "seconds": None, "stdout": "", "stderr": "", "document": None, "steps": []}
    return {**about, **empty, "outcome": outcome, "reason": reason}


# Times


def times(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Medians of every runner of every `ttft` check: stages, totals and rates by `ttft_report.figures`' keys."""
    from benchmarks.ttft.figures import figures, ranked

    entries = []
    for row in rows:
        run = row["document"] or {}
        for point in run["points"] if run.get("benchmark") == "ttft" else ():
            for runner in ranked(point, run["tokens"]):
                medians = {key: summary["median"] for key, summary in figures(runner, run["tokens"]).items()}
                about = {"check": row["name"], "resolution": point["resolution"], "runner": runner["name"]}
                entries.append(about | {"figures": medians, "error": runner.get("error")})
    return entries


def beside(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The estimates beside what `ttft-real` measured on CPU_AND_NE: seconds, of decode tokens/s; "error" is how far
    what was measured is from the range's middle (its geometric mean), as a part of that."""
    estimates = [row["document"] for row in rows if (row["document"] or {}).get("label") == "estimate"]
    measured = {
        row["resolution"]: row["figures"]
        for row in times(rows)
        if row["check"] == "ttft-real" and row["runner"].endswith("/coreml-CPU_AND_NE")
    }
    comparisons = []
    for estimate in (estimate for estimate in estimates if measured.get(estimate["resolution"])):
        ranges = estimate["stages"] | {"ttft_paper": estimate["total"], "decode_rate": estimate["decode"]}
        for stage, span in ranges.items():
            if (value := measured[estimate["resolution"]].get(stage)) is None:
                continue
            low, high = span["low"], span["high"]
            error = value / math.sqrt(low * high) - 1
            about = {"resolution": estimate["resolution"], "stage": stage, "measured": value, "low": low, "high": high}
            comparisons.append(about | {"error": error, "inside": low <= value <= high})
    return comparisons


# The page


def mac() -> dict[str, Any]:
    """A Mac's model, build, GPU cores and Xcode, which `environment.describe` lacks; {} elsewhere."""
    if sys.platform != "darwin":
        return {}
    cores = "system_profiler SPDisplaysDataType | sed -n 's/.*Total Number of Cores: //p'"
    known = {
        "model": output_of("sysctl", "-n", "hw.model"),
        "build": output_of("sw_vers", "-buildVersion"),
        "gpu": output_of("sh", "-c", cores),
        "xcode": output_of("xcodebuild", "-version"),
    }
    return {name: value for name, value in known.items() if value}


def sentence(document: Mapping[str, Any]) -> str:
    """The report in one line."""
    counts = {outcome: count for outcome, count in document["counts"].items() if count}
    listed = ", ".join(f"{count} {outcome}" for outcome, count in counts.items())
    return listed if document["passed"] is not None else f"No check ran here: {listed}"


def print_document(document: Mapping[str, Any]) -> None:
    """Outcome, check, result or reason, and time; then the machine. Where no check ran, only their names by part."""
    if document["passed"] is None:
        parts: dict[str, list[str]] = {}
        for row in document["checks"]:
            parts.setdefault(row["part"], []).append(row["name"])
        print_table("mac-report", ("part", "checks"), [(part, ", ".join(names)) for part, names in parts.items()])
        print("The page says what each of them would establish on a Mac.")
    else:
        rows = []
        for row in document["checks"]:
            text = "; ".join([row["reason"], *(f"{label}: {figure}" for label, figure in row["figures"].items())])
            seconds = "" if row["seconds"] is None else f"{row['seconds']:.0f}"
            rows.append((OUTCOMES[row["outcome"]], row["name"], text, seconds))
        print_table("mac-report", ("", "check", "result", "s"), rows, numbers=("s",))
    print(environment.machine_line(document["environment"]))
    print(sentence(document))


def render(document: Mapping[str, Any]) -> str:
    """The page as text. What processes printed is data: all of it is escaped, and the document is in it as JSON."""
    filters = {"shown": lambda value, key: "–" if value is None else shown(key, value)}
    machine = environment.machine_line(document["environment"])
    return page.render(TEMPLATE, filters, document=document, machine=machine, sentence=sentence(document))
