"""What a run of `benchmarks ttft` found, for people: figures, terminal table, Markdown, one self-contained page."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import environment
from benchmarks.ttft.runner import STAGES, totals
from fastvlm.common import page
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
_WIDTH = 110  # characters of the table where no terminal says
_HEADS = ("runner", "TTFT", "10–90 %", "app", "encode", "prefill", "next", "tok/s", "GB", "dB")  # of the short table
_LEGEND = (
    "TTFT: encode + project + prefill; app: preprocessing and the token's text, too; next: a second question on the"
    " same picture; tok/s: decoding; GB: peak memory; dB: the encoder's features against Transformers' in float32,"
    " signal to noise (–: not compared)."
)
TEMPLATE = Path(__file__).parent / "templates" / "ttft.html.j2"
BARS = STAGES[:5]  # of a stacked bar; together the app's total
TABLES = (tuple(LABELS), STAGES)  # the page's, by columns


def figures(runner: Mapping[str, Any], tokens: int) -> dict[str, dict[str, float]]:
    """Stage, total or `LABELS` key -> {"median", "p10", "p90", "rounds"} over all rounds of all launches.

    Seconds; "decode_rate" in tokens/s; "peak_bytes" the largest of all launches. Loads are without the libraries'
    import.
    """
    if "error" in runner:
        return {}
    rounds = [one["stages"] for launch in runner["launches"] for one in launch["rounds"]]
    columns: dict[str, list[float]] = {}
    for one in rounds:
        rate = {"decode_rate": tokens / one["decode"]} if one.get("decode") else {}
        for name, value in {**one, **totals(one), **rate}.items():
            columns.setdefault(name, []).append(value)
    loads = [launch["load_s"] for launch in runner["launches"] if launch["load_s"] is not None]
    cold = runner["cold"]
    if loads:
        columns["load"] = loads
    if cold["dropped"]:
        columns["load_cold"] = [cold["load_s"]]
        app = totals(cold["round"]["stages"]).get("ttft_app")
        columns |= {"answer_cold": [cold["load_s"] + app]} if app is not None else {}
    columns["peak_bytes"] = [runner["peak_bytes"]]
    return {name: _spread(values) for name, values in columns.items()}


def _spread(values: Sequence[float]) -> dict[str, float]:
    low, high = (values[0], values[0])
    if len(values) > 1:
        tenths = statistics.quantiles(values, n=10, method="inclusive")
        low, high = tenths[0], tenths[-1]
    return {"median": statistics.median(values), "p10": low, "p90": high, "rounds": len(values)}


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


def title(document: Mapping[str, Any], point: Mapping[str, Any]) -> str:
    """What a point is."""
    text = f"{point['text_tokens']} text tokens" if point["text_tokens"] else f"“{point['prompt']}”"
    return f"{document['checkpoint']['name']}, {point['resolution']} × {point['resolution']} pixels, {text}"


def notes(document: Mapping[str, Any]) -> list[tuple[str, str]]:
    """How the figures were obtained, as (word, sentence)."""
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
        ("asked", f"{document['picture']}, the same for all; {document['tokens']} tokens decoded;"
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


def delayed(document: Mapping[str, Any]) -> str | None:
    """The warning on a run whose stages were held up on purpose."""
    return f"SLOWED ON PURPOSE: {document['delay']}" if document["delay"] else None


# Terminal


def print_document(document: Mapping[str, Any]) -> None:
    """All points as tables on stdout."""
    from rich import box
    from rich.table import Table

    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = _WIDTH
    for point in document["points"]:
        unit, scale = _unit(point, document["tokens"])
        name = f"{title(document, point)}, in {unit}"
        table = Table(title=name, title_justify="left", box=box.SIMPLE, padding=(0, 1, 0, 0))
        for head in _HEADS:
            left = head == "runner"
            table.add_column(head, justify="left" if left else "right", no_wrap=True)
        for runner in ranked(point, document["tokens"]):
            if "error" not in runner:
                table.add_row(runner["name"], *_row(runner, document["tokens"], scale))
        console.print(table)
        for runner in point["runners"]:
            if line := runner.get("error") or runner.get("note"):
                console.print(f"{runner['name']}: {line}", markup=False)
    console.print(_LEGEND, markup=False)
    for line in (verdict(document), *(f"{label}: {value:g}" for label, value in ratios(document).items())):
        console.print(line, markup=False)
    for line in searched(document):
        console.print(line, markup=False)
    for name, line in notes(document):
        console.print(f"{name}: {line}", markup=False)
    if document.get("peers"):
        from benchmarks.peers.peers import print_comparison

        for comparison in document["peers"]:
            print_comparison(comparison)
    if warning := delayed(document):
        console.print(warning, style="red", markup=False)


def _row(runner: Mapping[str, Any], tokens: int, scale: float) -> list[str]:
    """What stands behind a runner's name under `_HEADS`: seconds times `scale`, and the rest."""
    found = figures(runner, tokens)

    def cell(key: str, which: str = "median") -> str:
        return f"{found[key][which] * scale:.3g}" if key in found else "–"

    spread = f"{cell('ttft_paper', 'p10')}–{cell('ttft_paper', 'p90')}"
    times = [cell(key) for key in ("ttft_app", "encode", "prefill", "next_question")]
    rate = f"{found['decode_rate']['median']:.3g}" if "decode_rate" in found else "–"
    memory = f"{found['peak_bytes']['median'] / 1e9:.2f}"
    return [cell("ttft_paper"), spread, *times, rate, memory, _parity(runner)]


def _parity(runner: Mapping[str, Any]) -> str:
    """How far the features are from Transformers' in float32, in dB."""
    features = runner.get("snr_db", {}).get("features", ...)
    return "–" if features is ... else "exact" if features is None else f"{features:.1f}"


def _unit(point: Mapping[str, Any], tokens: int) -> tuple[str, float]:
    """The unit of a point's table, and how many of it a second has: ms where most totals are shorter than a second."""
    known = [figures(runner, tokens) for runner in point["runners"]]
    known_totals = [found["ttft_paper"]["median"] for found in known if "ttft_paper" in found]
    return ("s", 1.0) if known_totals and statistics.median(known_totals) >= 1 else ("ms", 1e3)


def ranked(point: Mapping[str, Any], tokens: int) -> list[Mapping[str, Any]]:
    """The fastest first, then those without a total, the failed last."""

    def place(runner: Mapping[str, Any]) -> tuple[bool, float]:
        total = figures(runner, tokens).get("ttft_paper")
        return "error" in runner, total["median"] if total else float("inf")

    return sorted(point["runners"], key=place)


def searched(document: Mapping[str, Any]) -> list[str]:
    """What the search for Transformers' best setting tried, a line a device."""
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
    if warning := delayed(document):
        lines.append(f"**{warning}**")
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
        bars=BARS, notes=notes(document), delayed=delayed(document), verdict=verdict(document), ratios=ratios(document),
    )  # fmt: skip


def label(key: str) -> str:
    """A column's heading."""
    return LABELS.get(key, key)


def _panel(document: Mapping[str, Any], point: Mapping[str, Any]) -> dict[str, Any]:
    """A point for the template: its runners with figures, and the width that the longest bar has, in seconds."""
    rows: list[dict[str, Any]] = []
    for runner in ranked(point, document["tokens"]):
        found = figures(runner, document["tokens"])
        bar = [(stage, found[stage]["median"]) for stage in BARS if stage in found]
        rows.append({"runner": runner, "figures": found, "bar": bar, "length": sum(seconds for _, seconds in bar)})
    shortest = min((row["length"] for row in rows if row["length"]), default=1.0)
    longest = max((row["length"] for row in rows), default=0.0) or 1.0
    scale = min(longest, 12 * shortest)  # so that one very slow runner doesn't flatten the others
    tables = [[key for key in keys if any(key in row["figures"] for row in rows)] for keys in TABLES]
    return {"title": title(document, point), "rows": rows, "scale": scale, "tables": tables}


def verdict(document: Mapping[str, Any]) -> str:
    """The first point's result in a sentence: the fastest runner, and Transformers' fastest, as far as searched."""
    fastest, base = (_fastest(document, kind) for kind in ("artefact", "checkpoint"))
    if (first := fastest or base) is None:
        return "No runner finished"
    name, found = first
    sentence = f"{name}: {shown('s', found['ttft_paper']['median'])} to the first token"
    if fastest and base:
        word = "best setting" if document["search"] else "default"
        sentence += f"; Transformers' {word} ({base[0]}): {shown('s', base[1]['ttft_paper']['median'])}"
    return sentence


def ratios(document: Mapping[str, Any]) -> dict[str, float]:
    """What the first point's fastest artefact takes of others' time and memory, and a second question of its first."""
    ours = _fastest(document, "artefact")
    found = {}
    if ours:
        for label, kind in (("Transformers' fastest", "checkpoint"), ("mlx-vlm", "mlx-vlm")):
            if theirs := _fastest(document, kind):
                for key, what in (("ttft_paper", "TTFT"), ("peak_bytes", "peak memory")):
                    found[f"{what} / {label}"] = ours[1][key]["median"] / theirs[1][key]["median"]
        if "next_question" in ours[1]:
            found["next question / TTFT"] = ours[1]["next_question"]["median"] / ours[1]["ttft_paper"]["median"]
    return {label: float(f"{value:.3g}") for label, value in found.items()}


def _fastest(document: Mapping[str, Any], kind: str) -> tuple[str, dict[str, dict[str, float]]] | None:
    """The name and figures of the first point's fastest runner of a kind; None where none finished."""
    for runner in ranked(document["points"][0], document["tokens"]):
        found = figures(runner, document["tokens"])
        if runner["kind"] == kind and "ttft_paper" in found:
            return runner["name"], found
    return None
