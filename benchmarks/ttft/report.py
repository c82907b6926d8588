"""A run of `fastvlm ttft` as terminal tables and one self-contained page; comparisons of runs."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.text import Text

from benchmarks import environment
from benchmarks.ttft.figures import fastest, figures, ranked, ratios, title
from benchmarks.ttft.repeat import SLOWDOWN
from benchmarks.ttft.runner import STAGES
from fastvlm.common import page
from fastvlm.common.cli import wide_console
from fastvlm.common.terminal import print_table
from fastvlm.common.units import counted, format_bytes, format_seconds

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
_WIDTH = 130  # characters of the table where no terminal says another width
_HEADS = (
    "runner",
    "TTFT",
    "10–90 %",
    "app",
    "encode",
    "prefill",
    "next",
    "decode",
    "memory",
    "parity",
)  # of the short table
_LEGEND = (
    "TTFT: encode + project + prefill; app: preprocessing and the token's text, too; next: a second question on the"
    " same picture; memory: its peak; parity: the encoder's features (a Core AI bundle's image embeddings) against"
    " Transformers' in float32, signal to noise (–: not compared)."
)
INTERPRETER = "Core AI (interpreter"  # how its name begins among a runner's settings
TEMPLATE = Path(__file__).parent / "templates" / "ttft.html.j2"
BARS = STAGES[:5]  # of a stacked bar; together the app's total
TABLES = (tuple(LABELS), STAGES)  # the page's, by columns


def shown(key: str, value: float) -> str:
    """A figure for people."""
    if key == "peak_bytes":
        return format_bytes(value)
    if key == "decode_rate":
        return f"{value:.3g} tokens/s"
    return format_seconds(value)


def notes(document: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The origin of the figures, as (word, sentence)."""
    effort, points = document["effort"], document["points"]
    cold = [runner["cold"]["dropped"] for point in points for runner in point["runners"] if "cold" in runner]
    turns = any(point["turns"] for point in points)
    return [
        ("machine", f"{environment.machine_line(document['environment'])}; a runner's own threads are in its settings"),
        ("load", f"{document['load_before']['1min']:.1f} before, {document['load_after']['1min']:.1f} after"),
        ("versions", ", ".join(f"{name} {number}" for name, number in document["environment"]["packages"].items())),
        ("rounds", f"{counted(effort['launches'], 'process')} of each runner,"
         f" {counted(effort['rounds'], 'round')} in each after a warm-up,"
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
        *_on_the_interpreter(points),
        ("command", document["command"]),
        ("sources", f"commit {document['commit'] or 'unknown'}, {document['date']}"),
    ]  # fmt: skip


def _on_the_interpreter(points: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """A note where a runner is Apple's Core AI runtime off a Mac."""
    settings = [str(runner.get("settings")) for point in points for runner in point["runners"]]
    if not any(INTERPRETER in one for one in settings):
        return []
    words = "Apple's runtime in coreai-core, an interpreter on this machine's CPU: no device's times"
    return [("Core AI", f"{words}; its process's memory counts")]


def warnings(document: Mapping[str, Any]) -> list[str]:
    """The lines that nobody may miss: stages that were held up on purpose, and a machine that was busy."""
    lines = [f"SLOWED ON PURPOSE: {document['delay']}"] if document["delay"] else []
    load, cores = document["load_before"]["1min"], document["environment"]["cores"]
    if load > cores / 4:  # of the minute before the run
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
        runners = [runner for runner in ranked(point, document["tokens"]) if "error" not in runner]
        rows = [_row(runner, figures(runner, document["tokens"])) for runner in runners]
        print_table(title(document, point), _HEADS, rows, _HEADS[1:], console)
        for runner in point["runners"]:
            if line := runner.get("error") or runner.get("note"):
                console.print(f"{runner['name']}: {line}", markup=False)
    lines = [_LEGEND, verdict(document), *(f"{label}: {value:g}" for label, value in ratios(document).items())]
    for search in document["search"]:
        tried = [
            f"{row['setting']} {row['value']}".strip()
            + (f" {format_seconds(row['ttft_paper'])}" if "ttft_paper" in row else " failed")
            + (" ✓" if row["kept"] else "")
            for row in search["rows"]
        ]
        lines.append(f"Transformers' best on {search['device']}: {'; '.join(tried)}")
    for line in (*lines, *(f"{name}: {line}" for name, line in notes(document))):
        console.print(line, markup=False, soft_wrap=line.startswith("command: "))  # to be copied


def _row(runner: Mapping[str, Any], spreads: Mapping[str, Mapping[str, float]]) -> list[str]:
    """The cells under `_HEADS`."""
    paper = [spreads.get("ttft_paper", {}).get(key) for key in ("median", "p10", "p90")]
    first, *spread = ["–" if value is None else format_seconds(value) for value in paper]
    others = [
        shown(key, spreads[key]["median"]) if key in spreads else "–"
        for key in ("ttft_app", "encode", "prefill", "next_question", "decode_rate", "peak_bytes")
    ]
    errors = runner.get("snr_db", {})
    features = errors.get("features", errors.get("projected", ...))
    parity = "–" if features is ... else "exact" if features is None else f"{features:.1f} dB"
    return [runner["name"], first, "–".join(spread), *others, parity]


# The page


def render(document: Mapping[str, Any]) -> str:
    """The page as text. Names and errors are data: all of them are escaped."""
    filters: dict[str, Any] = {
        "shown": lambda value, key: shown(key, value),
        "label": lambda key: LABELS.get(key, key.replace("_", " ")),
    }
    return page.render(
        TEMPLATE, filters, document=document, points=[_panel(document, point) for point in document["points"]],
        bars=BARS, notes=notes(document), warnings=warnings(document), verdict=verdict(document),
        ratios=ratios(document),
    )  # fmt: skip


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
    return {"title": title(document, point), "rows": rows, "scale": scale, "longest": max(lengths), "tables": tables}


def verdict(document: Mapping[str, Any]) -> str:
    """The first point's result in a sentence: the fastest artefact, and Transformers' fastest."""
    ours, base = (fastest(document, kind) for kind in ("artefact", "checkpoint"))
    if (first := ours or base) is None:
        return "No runner finished"
    sentence = f"{first[0]}: {format_seconds(first[1]['ttft_paper'])} to the first token"
    if ours and base:
        word = "best setting" if document["search"] else "default"
        sentence += f"; Transformers' {word} ({base[0]}): {format_seconds(base[1]['ttft_paper'])}"
    return sentence


# A comparison of two runs


def print_changes(comparison: Mapping[str, Any]) -> None:
    """Print a table of what changed between two runs (`diff.compare`), and a sentence on the rest."""
    if comparison["changes"]:
        rows = [
            (
                row["runner"], row["stage"], shown(row["stage"], row["old"]), shown(row["stage"], row["new"]),
                f"{row['change']:+.1%}", f"{row['threshold']:.1%}",
                Text(row["called"], "red" if row["called"] == "slower" else "green"),
            )
            for row in comparison["changes"]
        ]  # fmt: skip
        print_table("changes beyond the noise", ("runner", "stage", "old", "new", "change", "called from", ""), rows)
    if quiet := [row["threshold"] for row in comparison["rows"] if not row["called"]]:
        print(
            f"no change in {len(quiet)} of {len(comparison['rows'])} stages and totals; a change is called from"
            f" {min(quiet):.1%} to {max(quiet):.1%}, by the noise of each"
        )
    for line in comparison["left_out"]:
        print(f"left out: {line}")
    for name, delay in zip(("OLD", "NEW"), comparison["delays"]):
        if delay:
            print(f"{name} was slowed on purpose: {delay}")


def print_repeated(result: Mapping[str, Any]) -> None:
    """Print how often `diff` was right (`repeat.repeat`), and each pair where it wasn't."""
    number = len(result["pairs"]) + len(result["slowed"])
    print(f"false calls: in {result['false']} of {number} pairs ({len(result['pairs'])} of them equal runs)")
    for index, calls in enumerate(result["pairs"], 1):
        if calls:
            print(f"  equal pair {index}: {', '.join(calls)}")
    right = sum(not pair["missed"] for pair in result["slowed"])
    print(f"a stage slowed by {SLOWDOWN - 1:.0%}: named in {right} of {len(result['slowed'])} pairs")
    for index, pair in enumerate(result["slowed"], 1):
        wrong = [f"not called for {', '.join(pair['missed'])}"] if pair["missed"] else []
        wrong += [f"also called: {', '.join(pair['false'])}"] if pair["false"] else []
        if wrong:
            print(f"  slowed pair {index}, {pair['stage']}: {'; '.join(wrong)}")
    for line in result["left_out"]:
        print(f"left out: {line}")
