"""A run of `benchmarks ttft` as terminal tables, Markdown, and one self-contained page; comparisons of runs."""

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from benchmarks import environment
from benchmarks.peers.report import print_peers
from benchmarks.ttft.figures import busy, fastest, figures, medians, ranked, ratios, title
from benchmarks.ttft.repeat import SLOWDOWN
from benchmarks.ttft.runner import STAGES
from fastvlm.common import page
from fastvlm.common.cli import wide_console
from fastvlm.common.staging import write_file
from fastvlm.common.terminal import Console

# Shown beside the stages: key -> label. Seconds, but for the rate and the memory.
LABELS = {
    "ttft_paper": "TTFT (encode + project + prefill)",
    "ttft_app": "TTFT with preprocessing and text",
    "next_question": "next question",
    "decode_rate": "decode",
    "load": "load, warm",
    "load_cold": "load, cold",
    "answer_cold": "first answer, cold",
    "peak_bytes": "peak memory",
}
_WIDTH = 110  # characters of the table where no terminal says another width
_HEADS = ("runner", "TTFT", "10–90 %", "app", "encode", "prefill", "next", "tok/s", "GB", "dB")  # of the short table
_LEGEND = (
    "TTFT: encode + project + prefill; app: preprocessing and the token's text, too; next: a second question on the"
    " same picture; tok/s: decoding; GB: peak memory; dB: the encoder's features against Transformers' in float32,"
    " signal to noise (–: not compared)."
)
TEMPLATE = Path(__file__).parent / "templates" / "ttft.html.j2"
BARS = STAGES[:5]  # of a stacked bar; together the app's total
TABLES = (tuple(LABELS), STAGES)  # the page's, by columns


def shown(key: str, value: float) -> str:
    """A figure for people."""
    if key == "peak_bytes":
        return f"{value / 1e9:.2f} GB"
    if key == "decode_rate":
        return f"{value:.3g} tokens/s"
    return f"{value:.3g} s" if value >= 1 else f"{value * 1e3:.3g} ms"


def settings_of(runner: Mapping[str, Any]) -> str:
    """A runner's settings in a line."""
    return ", ".join(f"{name} {value}" for name, value in runner.get("settings", {}).items())


def notes(document: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The origin of the figures, as (word, sentence)."""
    effort, points = document["effort"], document["points"]
    runners = [one for point in points for one in point["runners"] if one["kind"] != "peer"]  # these have no files
    cold = [runner["cold"]["dropped"] for runner in runners if "cold" in runner]
    turns = any(point["turns"] for point in points)
    lines = [
        ("machine", f"{environment.machine_line(document['environment'])}; a runner's own threads are in its settings"),
        ("load", f"{document['load_before']['1min']:.1f} before, {document['load_after']['1min']:.1f} after"),
        ("versions", ", ".join(f"{name} {number}" for name, number in document["environment"]["packages"].items())),
        ("rounds", f"{effort['launches']} processes of each runner, {effort['rounds']} rounds in each after a warm-up,"
         + (" the runners in turns, each started anew for each block of rounds: together they don't fit into memory;"
            if turns else " runners interleaved in an order that changes from round to round;")
         + " median and 10 % to 90 % of all rounds"),
        ("input", f"{document['picture']}, the same for all; {document['tokens']} tokens decoded;"
         f" weights {document['checkpoint']['sha256'][:12]}…, random where the checkpoint is synthetic"),
        ("cold", "the model's files were dropped from the page cache before a new process" if all(cold) and cold
         else "the page cache could not be emptied for every runner here: their cold loads are left out"),
        ("load time", "without the import of the libraries; memory-mapped weights are read when they are first used, so"
         " “first answer, cold” (load and first round) is the comparable figure"),
        ("memory", "peak resident size of the runner's process, memory-mapped weights included"),
        ("command", document["command"]),
        ("sources", f"commit {document['commit'] or 'unknown'}, {document['date']}"),
    ]  # fmt: skip
    return lines


def warnings(document: Mapping[str, Any]) -> list[str]:
    """The lines that nobody may miss: stages that were held up on purpose, and a machine that was busy."""
    lines = [f"SLOWED ON PURPOSE: {document['delay']}"] if document["delay"] else []
    if busy(document):
        load, cores = document["load_before"]["1min"], document["environment"]["cores"]
        lines.append(
            f"BUSY MACHINE: load {load:.1f} on {cores} cores when the run began, so times are longer and less certain"
            " than on an idle one"
        )
    return lines


# Terminal


def print_document(document: Mapping[str, Any]) -> None:
    """Print all points as tables on stdout."""
    console = wide_console(_WIDTH)
    for line in warnings(document):
        console.print(line, style="red", markup=False)
    for point in document["points"]:
        unit, scale = _unit(point, document["tokens"])
        name = f"{title(document, point)}, in {unit}"
        table = Table(title=name, title_justify="left", box=box.SIMPLE, padding=(0, 1, 0, 0))
        for head in _HEADS:
            table.add_column(head, justify="left" if head == "runner" else "right", no_wrap=True)
        for runner in ranked(point, document["tokens"]):
            if "error" not in runner:
                table.add_row(runner["name"], *_row(runner, document["tokens"], scale))
        console.print(table)
        for runner in point["runners"]:
            if line := runner.get("error") or runner.get("note"):
                console.print(f"{runner['name']}: {line}", markup=False)
    lines = [_LEGEND, verdict(document), *(f"{label}: {value:g}" for label, value in ratios(document).items())]
    lines += [*searched(document), *(f"{name}: {line}" for name, line in notes(document))]
    for line in lines:
        console.print(line, markup=False)
    for comparison in document.get("peers", []):
        print_peers(comparison)


def _row(runner: Mapping[str, Any], tokens: int, scale: float) -> list[str]:
    """The cells behind a runner's name under `_HEADS`: seconds times `scale`, and the rest."""
    spreads = figures(runner, tokens)

    def cell(key: str, which: str = "median", scale: float = scale) -> str:
        return f"{spreads[key][which] * scale:.3g}" if key in spreads else "–"

    spread = f"{cell('ttft_paper', 'p10')}–{cell('ttft_paper', 'p90')}"
    times = [cell(key) for key in ("ttft_app", "encode", "prefill", "next_question")]
    memory = f"{spreads['peak_bytes']['median'] / 1e9:.2f}"
    features = runner.get("snr_db", {}).get("features", ...)
    parity = "–" if features is ... else "exact" if features is None else f"{features:.1f}"
    return [cell("ttft_paper"), spread, *times, cell("decode_rate", scale=1), memory, parity]


def _unit(point: Mapping[str, Any], tokens: int) -> tuple[str, float]:
    """The unit of a point's table, and how many of it a second has: ms where most totals are shorter than a second."""
    known = [medians(one, tokens) for one in point["runners"]]
    totals = [times["ttft_paper"] for times in known if "ttft_paper" in times]
    return ("s", 1.0) if totals and statistics.median(totals) >= 1 else ("ms", 1e3)


def searched(document: Mapping[str, Any]) -> list[str]:
    """The trials of the search for Transformers' best setting, a line for each device."""
    lines = []
    for search in document["search"]:
        tried = []
        for row in search["rows"]:
            took = shown("s", row["ttft_paper"]) if "ttft_paper" in row else "failed"
            tried.append(f"{row['setting']} {row['value']}".strip() + f" {took}{' ✓' if row['kept'] else ''}")
        lines.append(f"Transformers' best on {search['device']}: {'; '.join(tried)}")
    return lines


# Markdown


def markdown(document: Mapping[str, Any]) -> str:
    """A table for a README, a point after the other."""
    lines = []
    for point in document["points"]:
        unit, scale = _unit(point, document["tokens"])
        name = f"**{title(document, point)}, in {unit}**"
        lines += [name, "", f"| {' | '.join(_HEADS)} |", "|---" * len(_HEADS) + "|"]
        for runner in ranked(point, document["tokens"]):
            failed = [runner.get("error", "").replace("|", "\\|"), *[""] * (len(_HEADS) - 2)]
            cells = failed if "error" in runner else _row(runner, document["tokens"], scale)
            lines.append(f"| {runner['name']} | {' | '.join(cells)} |")
        lines.append("")
    lines += [_LEGEND, ""]
    machine = environment.machine_line(document["environment"])
    lines.append(f"{machine}, load {document['load_before']['1min']:.1f}, {document['date'][:10]}.")
    lines += [f"**{warning}**" for warning in warnings(document)]
    return "\n".join(lines) + "\n"


# The page


def write(path: Path, document: Mapping[str, Any]) -> None:
    """Write the page to `path`, atomically."""
    write_file(path, render(document).encode())


def render(document: Mapping[str, Any]) -> str:
    """The page as text. Names and errors are data: all of them are escaped."""
    filters: dict[str, Any] = {"shown": lambda value, key: shown(key, value), "settings": settings_of, "label": label}
    return page.render(
        TEMPLATE, filters, document=document, points=[_panel(document, point) for point in document["points"]],
        bars=BARS, notes=notes(document), warnings=warnings(document), verdict=verdict(document),
        ratios=ratios(document),
    )  # fmt: skip


def label(key: str) -> str:
    """A column's heading."""
    return LABELS.get(key, key)


def _panel(document: Mapping[str, Any], point: Mapping[str, Any]) -> dict[str, Any]:
    """A point for the template: its runners with figures, and the width that the longest bar has, in seconds."""
    rows: list[dict[str, Any]] = []
    for runner in ranked(point, document["tokens"]):
        spreads = figures(runner, document["tokens"])
        bar = [(stage, spreads[stage]["median"]) for stage in BARS if stage in spreads]
        rows.append({"runner": runner, "figures": spreads, "bar": bar, "length": sum(seconds for _, seconds in bar)})
    lengths = [row["length"] for row in rows if row["length"]] or [1.0]
    scale = min(max(lengths), 12 * min(lengths))  # so that one very slow runner doesn't flatten the others
    tables = [[key for key in keys if any(key in row["figures"] for row in rows)] for keys in TABLES]
    return {"title": title(document, point), "rows": rows, "scale": scale, "tables": tables}


def verdict(document: Mapping[str, Any]) -> str:
    """The first point's result in a sentence: the fastest artefact, and Transformers' fastest."""
    ours, base = (fastest(document, kind) for kind in ("artefact", "checkpoint"))
    if (first := ours or base) is None:
        return "No runner finished"
    sentence = f"{first[0]}: {shown('s', first[1]['ttft_paper'])} to the first token"
    if ours and base:
        word = "best setting" if document["search"] else "default"
        sentence += f"; Transformers' {word} ({base[0]}): {shown('s', base[1]['ttft_paper'])}"
    return sentence


# A comparison of two runs


def print_changes(comparison: Mapping[str, Any]) -> None:
    """Print a table of what changed between two runs (`diff.compare`), and a sentence on the rest."""
    console = Console(highlight=False)
    if comparison["changes"]:
        table = Table(title="changes beyond the noise", title_justify="left")
        for column in ("runner", "stage", "old", "new", "change", "called from", ""):
            table.add_column(column, overflow="fold")
        for row in comparison["changes"]:
            style = "red" if row["called"] == "slower" else "green"
            times = (shown(row["stage"], row["old"]), shown(row["stage"], row["new"]), f"{row['change']:+.1%}")
            called = f"[{style}]{row['called']}[/]"
            table.add_row(row["runner"], row["stage"], *times, f"{row['threshold']:.1%}", called)
        console.print(table)
    if quiet := [row["threshold"] for row in comparison["rows"] if not row["called"]]:
        console.print(
            f"no change in {len(quiet)} of {len(comparison['rows'])} stages and totals; a change is called from"
            f" {min(quiet):.1%} to {max(quiet):.1%}, by the noise of each", markup=False,
        )  # fmt: skip
    for line in comparison["left_out"]:
        console.print(f"left out: {line}", markup=False)
    for name, delay in zip(("OLD", "NEW"), comparison["delays"]):
        if delay:
            console.print(f"{name} was slowed on purpose: {delay}", style="red", markup=False)


def print_repeated(result: Mapping[str, Any]) -> None:
    """Print how often `diff` was right (`repeat.repeat`), and each pair where it wasn't."""
    number = len(result["pairs"]) + len(result["slowed"])
    print(f"false calls: in {result['false']} of {number} pairs ({len(result['pairs'])} of them equal runs)")
    for index, calls in enumerate(result["pairs"], 1):
        if calls:
            print(f"  equal pair {index}: {', '.join(calls)}")
    right = sum(not one["missed"] for one in result["slowed"])
    print(f"a stage slowed by {SLOWDOWN - 1:.0%}: named in {right} of {len(result['slowed'])} pairs")
    for index, one in enumerate(result["slowed"], 1):
        wrong = [f"not called for {', '.join(one['missed'])}"] if one["missed"] else []
        wrong += [f"also called: {', '.join(one['false'])}"] if one["false"] else []
        if wrong:
            print(f"  slowed pair {index}, {one['stage']}: {'; '.join(wrong)}")
    for line in result["left_out"]:
        print(f"left out: {line}")
