"""All pages: each is one file that fetches nothing, the same twice, and whatever names and answers hold stays text."""

import copy
import re
from types import SimpleNamespace

import pytest
from html_page import Page
from PIL import Image

from benchmarks.mac import check as mac_check
from benchmarks.mac import report as mac_report
from benchmarks.parity import compare, verdict
from benchmarks.parity import report as parity_report
from benchmarks.ttft import report as ttft_report
from fastvlm.demo import page as demo
from quantization.sweep import report as sweep_report
from tests.benchmarks.ttft.ttft_documents import document
from tests.quantization.sweep.sweep_documents import document_of, sweep_of

HOSTILE = '"><script>alert(1)</script><img src=http://evil.example/x onerror=alert(2)> {{ 7*7 }} | & </style>'


def demo_page(request, text):
    question = SimpleNamespace(kind=text("count"), image=Image.new("RGB", (8, 8)), question=text("q"), answer=text("a"))
    model = SimpleNamespace(language=SimpleNamespace(name=text("runner")))
    folder = request.getfixturevalue("tmp_path")
    return demo._write_page([(question, text("b"), False)], 0, model, text("model"), folder).read_text()


def mac_page(request, text):
    fields = {name: text(name) for name in ("name", "part", "title", "establishes", "passes", "command")}
    row = mac_report._row(mac_check.Check(needs=["Core ML"], **fields), "failed", text("reason"))
    row |= {"figures": {text("label"): text("figure")}, "stdout": text("out"), "stderr": text("err"), "seconds": 1.0}
    ran = {"passed": False, "counts": {"failed": 1}, "checks": [row], "times": [], "beside": []}
    load = {"1min": 0.1, "cores": 2}
    machine = document(1)["environment"] | {"model": text("Mac")}
    return mac_report.render(
        ran | {"environment": machine, "load_before": load, "load_after": load, "command": text("command")}
    )


def parity_page(request, text):
    names = ("reference", "candidate", "shown", "operations", "sides", "compared")
    reference, candidate, shown, operations, sides, compared = map(request.getfixturevalue, names)
    operations, sides = copy.deepcopy((operations, sides))
    rows = compared(reference, candidate, shown)
    for row in rows:
        row.name, row.question, row.truth, row.reference, row.candidate = map(text, ("n", "q", "t", "r", "c"))
    rows[1].divergence = {
        "position": 2, "common": text("There are"), "margin": 0.02, "reference": {"token": " three", "rest": " stars."},
        "candidate": {"token": text(" four"), "rest": text(" stars.")},
    }  # fmt: skip
    for error in operations["rounding"] + operations["layers"]:
        error |= {"name": text("x"), "snr_db": 20.0}
        error["layer"] = error["layer"] and text(error["layer"])
    sides["candidate"] = {"name": text("artefact"), "runners": {"vision": text("v")}}
    result = verdict.document(rows, operations, "fp16", sides)
    return parity_report.render(result, [compare.thumbnail(one.image) for one in shown], text("command"))


def sweep_page(request, text):
    points, outcome = sweep_of(name=text)
    lost = points[1]["name"]
    del outcome.results[lost]
    outcome.errors[lost] = text("failed")
    return sweep_report.render(document_of(points, outcome, name=text), {text("q1"): "data:image/jpeg;base64,AAAA"})


def ttft_page(request, text):
    run = document(3) | {"command": text("command"), "picture": text("picture")}
    runners, search = (
        run["points"][0]["runners"],
        {"setting": "dtype", "value": text("x"), "ttft_paper": 1, "kept": True},
    )
    run["checkpoint"]["name"] = run["points"][0]["prompt"] = text("name")
    runners[0]["name"] = text("runner")
    runners.append({"name": "mlx-vlm", "kind": "mlx-vlm", "error": text("killed")})
    run["search"] = [{"device": "cpu", "rows": [search, search | {"error": text("none")}], "best": {}}]
    return ttft_report.render(run)


@pytest.mark.parametrize("render", [demo_page, mac_page, parity_page, sweep_page, ttft_page])
def test_page_fetches_nothing_and_whatever_it_is_given_stays_text(request, render):
    plain = render(request, str)
    page, hostile = Page(plain), Page(render(request, lambda text: text + HOSTILE))
    for tag, name, value in page.attributes:
        if name in ("src", "href", "xlink:href", "srcset", "data", "action"):
            assert value.startswith(("data:image/", "#")), (tag, name, value)
    assert not re.search(r"https?://|@import|url\((?!#)", plain) and render(request, str) == plain
    scripts = {value for tag, name, value in page.attributes if (tag, name) == ("script", "type")}
    assert not {"link", "iframe"} & {*page.tags} and scripts <= {"application/json"}
    assert page.tags.count("script") <= len(scripts)
    for tag in ("script", "img"):
        assert hostile.tags.count(tag) == page.tags.count(tag), tag
    assert not [name for _, name, _ in hostile.attributes if name.startswith("on")]
    assert any("<script>alert(1)</script>" in text for text in hostile.texts)
    assert any("{{ 7*7 }}" in text for text in hostile.texts)
