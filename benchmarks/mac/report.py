"""`python -m benchmarks mac-report`: everything that only a Mac can verify, on one page.

The checks are a table (mac_checks.json): what each establishes, the command that it runs, what counts as passed. Each
is a process of its own, because Core ML and Metal can end the process that calls them (coremltools #2757, #2758).
"""

import argparse
import json
import math
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.text import Text

from benchmarks import environment
from benchmarks.mac import check as mac_check
from benchmarks.mac.check import Check
from benchmarks.suites.suite import DEMO
from benchmarks.ttft.report import shown
from fastvlm.common import page
from fastvlm.common.cli import log, progress
from fastvlm.common.errors import UserError
from fastvlm.common.files import Output
from fastvlm.common.staging import write_file
from fastvlm.common.terminal import mark, print_table

TABLE = Path(__file__).with_name("mac_checks.json")
TEMPLATE = Path(__file__).parent / "templates" / "mac_report.html.j2"
MAC = ("Core ML", "Metal", "Xcode", "macOS")  # of what checks need, what only a Mac has
OUTCOMES: dict[str, str | Text] = {"passed": mark(True), "failed": mark(False), "skipped": mark(None), "by hand": "☞"}
_LARGEST = 1 << 20  # characters of a check's JSON document that the page keeps


def add_parser(subparsers: Any) -> None:
    """Add the verb `mac-report`."""
    text = "run everything that only a Mac can verify and write one page (elsewhere: what each check would establish)"
    parser = subparsers.add_parser("mac-report", description=text)
    parser.add_argument("--model", type=Path, metavar="ARTEFACT", help="default: --checkpoint, exported first")
    parser.add_argument(
        "--checkpoint",
        type=Path,
        metavar="FOLDER",
        help="what the artefact is compared with (default: with --model nothing, without it the demo checkpoint)",
    )
    parser.add_argument("--check", nargs="+", metavar="NAME", help="only these rows of the page, by their names")
    parser.add_argument(
        "--output", type=Output(), default=Path("build/mac-report.html"), metavar="FILE", help="(default: %(default)s)"
    )
    parser.set_defaults(run=run_mac_report)


def run_mac_report(args: argparse.Namespace) -> dict[str, Any]:
    """Run the checks, print the table, write the page. "passed" is False when one failed, None when none ran."""
    checks, places, missing = _chosen(load(), args.check), _places(args), absent(args)
    before = environment.load()
    rows: list[dict[str, Any]] = []
    for number, check in enumerate(checks, 1):
        if why := _why_not(check, places, missing, rows):
            rows.append(_row(check, "skipped", why))
        elif check.steps:
            rows.append(_row(check, "by hand", check.passes) | {"steps": [_filled(one, places) for one in check.steps]})
        else:
            with progress(f"{number}/{len(checks)} {check.name}, at most {check.seconds / 60:.0f} minutes"):
                rows.append(_ran(check, places))
            log(f"{number}/{len(checks)} {check.name}: {rows[-1]['outcome']}: {rows[-1]['reason']}")
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
        "command": shlex.join(["python", "-m", "benchmarks", *sys.argv[1:]]),
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


# The table


def load(table: Path | None = None) -> list[Check]:
    """The checks in order; a row with `each` stands for one with each of its values. TypeError or ValueError for a
    fault in the table: a mistake of ours."""
    checks = []
    for row in json.loads((table or TABLE).read_text(encoding="utf-8")):
        for place, values in row.pop("each", {"": [""]}).items():
            for value in values:
                own = json.dumps(row).replace(f"{{{place}}}", value) if place else json.dumps(row)
                checks.append(Check(**json.loads(own)))
    names = [check.name for check in checks]
    for check in checks:
        if names.count(check.name) > 1 or check.after not in ("", *names[: names.index(check.name)]):
            raise ValueError(f"{check.name}: its name is another's, or {check.after!r} does not come before it")
        if bool(check.command) == bool(check.steps):
            raise ValueError(f"{check.name}: either a command or steps")
    return checks


def _chosen(checks: list[Check], names: Sequence[str] | None) -> list[Check]:
    """The named checks, and those that make what they read."""
    known = {check.name: check for check in checks}
    if unknown := sorted(set(names or ()) - set(known)):
        raise UserError(f"--check: got {', '.join(unknown)}, expected some of {', '.join(known)}")
    wanted = set(names or known)
    for check in reversed(checks):
        wanted |= {check.after} if check.name in wanted else set()
    return [check for check in checks if check.name in wanted]


def _places(args: argparse.Namespace) -> dict[str, str]:
    """What stands in the commands' braces. UserError for a path that can't be used."""
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
    paths = {"work": work, "artefact": made, "checkpoint": checkpoint}
    return {name: str(path) for name, path in paths.items()} | {"device": known_device() or ""}


def absent(args: argparse.Namespace) -> dict[str, str]:
    """What a check may need and has not got here -> why not. A Mac is asked for first."""
    found = {}
    if known_device() is None:
        found["device"] = f"devices.json has no Mac with {environment.describe()['cpu']}"
    if sys.platform != "darwin":
        found = {need: f"needs a Mac ({need}), this is {sys.platform}" for need in MAC} | found
    elif not _says("xcrun", "--find", "coremlcompiler"):
        found["Xcode"] = "needs Xcode (the app: its command line tools alone have no coremlcompiler)"
    if args.model is not None:
        found["no --model"] = "--model was given"
        if args.checkpoint is None:
            found["checkpoint"] = "--checkpoint was not given, and what the artefact was made from is not in it"
    return found


def known_device() -> str | None:
    """This Mac's key in devices.json, by its chip's name; None when it isn't there."""
    from benchmarks.estimate.devices import devices

    chip = environment.describe()["cpu"].removeprefix("Apple ")
    return next((key for key, device in devices().items() if (device.kind, device.chip) == ("mac", chip)), None)


def _why_not(
    check: Check, places: Mapping[str, str], missing: Mapping[str, str], rows: Sequence[Mapping[str, Any]]
) -> str:
    """Why a check is not run; empty when it is."""
    if why := next((text for need, text in missing.items() if need in check.needs), ""):
        return why
    if check.after in [row["name"] for row in rows if row["outcome"] == "failed"]:
        return f"{check.after} failed, so there is nothing to look at"
    made = _filled(check.makes, places)
    return f"{made} is there from an earlier run" if made and Path(made).exists() else ""


def _filled(text: str, places: Mapping[str, str]) -> str:
    return re.sub(r"{(\w+)}", lambda found: places[found[1]], text)


def command(check: Check, places: Mapping[str, str]) -> list[str]:
    """The check's command, word by word; `python` is this one."""
    first, *rest = (_filled(word, places) for word in shlex.split(check.command))
    return [sys.executable if first == "python" else first, *rest]


# Running


def _ran(check: Check, places: Mapping[str, str]) -> dict[str, Any]:
    Path(places["work"]).mkdir(parents=True, exist_ok=True)
    done = mac_check.run(command(check, places), check.seconds)
    fault = mac_check.judge(check, done)
    shown = {label: text for label, path, unit in check.figures if (text := mac_check.shown(done.document, path, unit))}
    small = done.document if len(json.dumps(done.document)) <= _LARGEST else None
    return _row(check, "failed" if fault else "passed", fault or check.passes) | {
        "figures": shown,
        "seconds": round(done.seconds, 1),
        "command": shlex.join(["python" if word == sys.executable else word for word in command(check, places)]),
        "stdout": done.stdout,
        "stderr": done.stderr,
        "document": small,
    }


def _row(check: Check, outcome: str, reason: str) -> dict[str, Any]:
    """What the page says of a check; what only one that ran has is empty."""
    kept = {key: value for key, value in asdict(check).items() if key in ("name", "part", "title", "establishes")}
    empty: dict[str, Any] = {"figures": {}, "seconds": None, "stdout": "", "stderr": "", "document": None, "steps": []}
    return {**kept, **empty, "command": check.command, "outcome": outcome, "reason": reason}


# Times


def times(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Medians of every runner of every `ttft` check: stages, totals and rates by `ttft_report.figures`' keys."""
    from benchmarks.ttft.figures import figures, ranked

    found = []
    for row in rows:
        run = row["document"] or {}
        for point in run["points"] if run.get("benchmark") == "ttft" else ():
            for runner in ranked(point, run["tokens"]):
                medians = {key: one["median"] for key, one in figures(runner, run["tokens"]).items()}
                about = {"check": row["name"], "resolution": point["resolution"], "runner": runner["name"]}
                found.append(about | {"figures": medians, "error": runner.get("error")})
    return found


def beside(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The estimates beside what `ttft-real` measured on CPU_AND_NE: seconds, of decode tokens/s; "error" is how far
    what was measured is from the range's middle (its geometric mean), as a part of that."""
    estimates = [row["document"] for row in rows if (row["document"] or {}).get("label") == "estimate"]
    measured = {
        one["resolution"]: one["figures"]
        for one in times(rows)
        if one["check"] == "ttft-real" and one["runner"].endswith("/coreml-CPU_AND_NE")
    }
    found = []
    for estimate in (one for one in estimates if measured.get(one["resolution"])):
        ranges = estimate["stages"] | {"ttft_paper": estimate["total"], "decode_rate": estimate["decode"]}
        for stage, span in ranges.items():
            if (value := measured[estimate["resolution"]].get(stage)) is None:
                continue
            low, high = span["low"], span["high"]
            error = value / math.sqrt(low * high) - 1
            about = {"resolution": estimate["resolution"], "stage": stage, "measured": value, "low": low, "high": high}
            found.append(about | {"error": error, "inside": low <= value <= high})
    return found


# The page


def mac() -> dict[str, Any]:
    """What `environment.describe` does not say of a Mac; nothing elsewhere."""
    if sys.platform != "darwin":
        return {}
    known = {
        "model": _says("sysctl", "-n", "hw.model"),
        "build": _says("sw_vers", "-buildVersion"),
        "gpu": _says("sh", "-c", "system_profiler SPDisplaysDataType | sed -n 's/.*Total Number of Cores: //p'"),
        "xcode": _says("xcodebuild", "-version"),
    }
    return {name: value for name, value in known.items() if value}


def _says(*words: str) -> str:
    """What a command of the system prints, on one line; empty when it is not there or fails."""
    with suppress(OSError, subprocess.SubprocessError):
        return ", ".join(
            subprocess.run(words, capture_output=True, text=True, check=True, timeout=60).stdout.split("\n")
        ).strip(", ")
    return ""


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
    return page.render(TEMPLATE, filters, found=document, machine=machine, sentence=sentence(document))
