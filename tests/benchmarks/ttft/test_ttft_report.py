"""Figures, table and page of a run: right, self-contained, escaped; a slowed run can't be mistaken."""

import re

import numpy as np
import pytest
from html_page import Page
from ttft_documents import BASE, changed, document

from benchmarks.ttft import figures, report


@pytest.fixture(scope="module")
def measured():
    run = document(3)
    runners = run["points"][0]["runners"]
    runners[0]["snr_db"] = {"features": 52.8, "logits": None}
    runners[1]["note"] = "2 × 3 rounds: one takes 60 s, and the budget is 120 s"
    runners.append({"name": "mlx-vlm", "kind": "mlx-vlm", "error": "killed by the system (SIGKILL)"})
    rows = [
        {"setting": "default", "value": "", "ttft_paper": 0.2, "kept": True},
        {"setting": "dtype", "value": "bfloat16", "ttft_paper": 0.1, "kept": True},
        {"setting": "attention", "value": "eager", "error": "no such attention", "kept": False},
    ]
    run["search"] = [{"device": "cpu", "rows": rows, "best": {"dtype": "bfloat16"}}]
    return run


def test_figures_are_those_of_all_rounds(measured):
    runner = measured["points"][0]["runners"][0]
    found = figures.figures(runner, 16)
    rounds = [one["stages"] for launch in runner["launches"] for one in launch["rounds"]]
    encode = [one["encode"] for one in rounds]
    assert found["encode"]["rounds"] == 72
    assert [found["encode"][key] for key in ("median", "p10", "p90")] == pytest.approx(
        np.percentile(encode, [50, 10, 90]).tolist()
    )
    paper = [one["encode"] + one["project"] + one["prefill"] for one in rounds]
    assert found["ttft_paper"]["median"] == pytest.approx(np.median(paper))
    app = [one["preprocess"] + p + one["first_token"] for one, p in zip(rounds, paper)]
    assert found["ttft_app"]["p90"] == pytest.approx(np.percentile(app, 90))
    assert found["decode_rate"]["median"] == pytest.approx(np.median([16 / one["decode"] for one in rounds]))
    assert found["load"]["median"] == 0.5 and found["load_cold"]["median"] == 1.0
    assert found["answer_cold"]["median"] == pytest.approx(1 + sum(BASE[stage] for stage in list(BASE)[:5]))
    assert found["peak_bytes"]["median"] == 1e9
    assert figures.figures({"error": "killed"}, 16) == {}


def test_loads_that_were_not_cold_are_left_out(measured):
    run = changed(measured)
    runner = run["points"][0]["runners"][0]
    assert "could not be emptied" not in report.render(run)
    runner["cold"]["dropped"] = False
    assert not {"load_cold", "answer_cold"} & set(figures.figures(runner, 16))
    assert "could not be emptied" in report.render(run)


def test_a_bar_that_is_cut_is_said_to_be(measured):
    run = changed(measured)
    text = report.render(run)
    assert "not to scale" not in text and "first_token" not in re.sub(r"--first_token", "", text)
    assert re.search(r"ms <small>", text), "a narrow page shows both on one line"
    for launch in run["points"][0]["runners"][0]["launches"]:
        for one in launch["rounds"]:
            one["stages"]["encode"] *= 100
    assert "bars marked (cut) are not to scale" in report.render(run)


def test_page_and_terminal_show_everything(measured, capsys):
    text = report.render(measured)
    page = Page(text)
    said = " ".join(page.texts)
    parts = ("killed by the system", "2 × 3 rounds", "52.8 dB", "logits exact", "dtype float32, threads 1", "dtype bf")
    assert not [part for part in parts if part not in said]
    assert said.index("fp16/executor-as-typed") < said.index("mlx-vlm") and "SLOWED" not in text

    report.print_document(measured)
    terminal = capsys.readouterr().out
    assert "mlx-vlm: killed" in terminal and "Transformers' best on cpu: default 200 ms ✓" in terminal
    rows = {row.split()[0]: row for row in terminal.splitlines() if row}
    median = figures.figures(measured["points"][0]["runners"][0], 16)["ttft_paper"]["median"]
    assert rows["fp16/executor-as-typed"].split()[1:3] == [f"{median * 1e3:.3g}", "ms"]
    assert rows["fp16/executor-as-typed"].endswith("52.8 dB")


def test_bars_are_as_long_as_their_stages(measured):
    run = document(1, quiet=True)
    run["points"][0]["runners"][1] = document(1, {"encode": 3.0}, quiet=True)["points"][0]["runners"][1]
    text = report.render(run)
    total = sum(BASE[stage] for stage in list(BASE)[:5])
    lengths = [float(width) for width in re.findall(r'class="bar" style="width: ([\d.]+)%', text)]
    assert lengths[0] / lengths[1] == pytest.approx(total / (total + 2 * BASE["encode"]), rel=1e-3)
    first = re.search(r'class="bar".*?</div>', text, re.DOTALL).group()
    shares = [float(width) for width in re.findall(r'<i style="width: ([\d.]+)%', first)]
    assert shares == pytest.approx([100 * BASE[stage] / total for stage in list(BASE)[:5]], abs=0.02)


def test_a_slowed_run_and_a_busy_machine_say_so_everywhere(capsys):
    run = document(3, {"encode": 1.5})
    for load, busy in ((0.4, False), (3.0, True)):
        run["load_before"]["1min"] = load
        report.print_document(run)
        for text in (report.render(run), capsys.readouterr().out):
            text = " ".join(text.split())
            assert "SLOWED ON PURPOSE: encode=x1.5" in text
            assert ("BUSY MACHINE: load 3.0 on 2 cores" in text) == busy


def test_the_sentence_names_the_fastest_and_transformers_best():
    run = document(1, quiet=True)
    run["points"][0]["runners"][1] = document(1, {"encode": 2.0}, quiet=True)["points"][0]["runners"][1]
    assert report.verdict(run) == (
        "fp16/executor-as-typed: 14.3 ms to the first token; Transformers' default (transformers-cpu): 24.3 ms"
    )
    found = figures.ratios(run)
    assert found["TTFT / Transformers' fastest"] == pytest.approx(14.3 / 24.3, abs=0.005)
    assert found["peak memory / Transformers' fastest"] > 0 and found["next question / TTFT"] > 0
    assert not any("mlx-vlm" in label for label in found)
    for runner in run["points"][0]["runners"]:
        runner["error"] = "killed"
    assert report.verdict(run) == "No runner finished"
