"""Figures, table, Markdown and page of a run: right, self-contained, escaped; a slowed run can't be mistaken."""

import re

import numpy as np
import pytest
from html_page import Page
from ttft_documents import BASE, changed, document

from benchmarks.ttft import figures, report

HOSTILE = '"><script>alert(1)</script><img src=http://evil.example/x onerror=alert(2)> {{ 7*7 }} | & </style>'


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
        {"setting": "compile", "value": True, "ttft_paper": 0.15, "compile_s": 33.0, "kept": False},
        {"setting": "attention", "value": "eager", "error": "no such attention", "kept": False},
    ]
    run["search"] = [{"device": "cpu", "rows": rows, "best": {"dtype": "bfloat16"}}]
    run["peers"] = [
        {"name": "llava", "title": "FastVLM against LLaVA", "error": None, "explanation": ["Because."],
         "rows": [{"figure": "ttft", "label": "TTFT, s", "fastvlm": 1.0, "peer": 80.0, "ratio": 80.0, "claimed": 85.0,
                   "source": "the paper"},
                  {"figure": "m", "label": "MACs", "fastvlm": None, "peer": None, "ratio": None, "claimed": None,
                   "source": None}]}
    ]  # fmt: skip
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
    runner = changed(measured["points"][0]["runners"][0])
    runner["cold"]["dropped"] = False
    assert not {"load_cold", "answer_cold"} & set(figures.figures(runner, 16))
    run = changed(measured)
    run["points"][0]["runners"][0] = runner
    assert "could not be emptied" in report.render(run)
    run["points"][0]["runners"][0] = measured["points"][0]["runners"][0] | {"kind": "peer", "cold": runner["cold"]}
    assert "could not be emptied" not in report.render(run)  # a peer has no files


def test_the_page_fetches_nothing_and_shows_everything(measured):
    text = report.render(measured)
    page = Page(text)
    assert not {"script", "link", "img", "iframe"} & set(page.tags)
    assert not re.search(r"(?:src|href)=|url\(|https?://", text)
    assert "prefers-color-scheme: dark" in text
    said = " ".join(page.texts)
    parts = ("killed by the system", "2 × 3 rounds", "52.8 dB", "logits exact", "33 s of compiling", "85 ×", "Because.")
    assert not [part for part in parts if part not in said]
    assert said.index("fp16/executor-as-typed") < said.index("mlx-vlm")
    assert "SLOWED" not in text


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


def test_hostile_names_stay_text(measured):
    run = changed(measured, command=HOSTILE, picture=HOSTILE)
    run["checkpoint"]["name"] = run["points"][0]["prompt"] = HOSTILE
    run["points"][0]["runners"][0]["name"] = run["points"][0]["runners"][2]["error"] = HOSTILE
    run["search"][0]["rows"][3]["error"] = HOSTILE
    page = Page(report.render(run))
    assert not {"script", "img"} & set(page.tags)
    assert any("{{ 7*7 }}" in text for text in page.texts)


def test_a_slowed_run_and_a_busy_machine_say_so_everywhere(capsys):
    run = document(3, {"encode": 1.5})
    for load, busy in ((0.4, False), (3.0, True)):
        run["load_before"]["1min"] = load
        report.print_document(run)
        for text in (report.render(run), report.markdown(run), capsys.readouterr().out):
            text = " ".join(text.split())
            assert "SLOWED ON PURPOSE: encode=x1.5" in text
            assert ("BUSY MACHINE: load 3.0 on 2 cores" in text) == busy


def test_terminal_and_markdown_have_a_row_for_each_runner(measured, capsys):
    report.print_document(measured)
    terminal = capsys.readouterr().out
    lines = report.markdown(measured).splitlines()
    for name in ("fp16/executor-as-typed", "transformers-cpu", "mlx-vlm"):
        assert name in terminal
        assert sum(line.startswith(f"| {name} |") for line in lines) == 1
    table = [line for line in lines if line.startswith("|")]
    assert len({line.count("|") for line in table}) == 1
    median = figures.figures(measured["points"][0]["runners"][0], 16)["ttft_paper"]["median"]
    assert f"| {median * 1e3:.3g} |" in "\n".join(table) and "in ms" in lines[0]
    ends = {line.split(" | ")[0]: line.split(" | ")[-1] for line in table}
    assert ends["| runner"] == "dB |" and ends["| fp16/executor-as-typed"] == "52.8 |"
    assert ends["| transformers-cpu"] == "– |" and "52.8" in terminal and "dB: the encoder's features" in terminal
    assert "FastVLM against LLaVA" in terminal and "Transformers' best on cpu: default 200 ms ✓" in terminal


def test_the_sentence_names_the_fastest_and_transformers_best(measured):
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
