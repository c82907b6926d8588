"""docs/BENCHMARKS.md from saved runs: a section is replaced, the rest stays, and a missed bar says so."""

import json
from pathlib import Path

import pytest

from benchmarks import environment
from benchmarks.suites.suite import judge
from fastvlm.common.children import ROOT


@pytest.fixture
def saved(tmp_path) -> Path:
    figures = {
        "time": judge("time of | all", 9.5, "s", "<=", 10),
        "ratio": judge("  a ratio", 0.5, "", "<", 0.4),
        "peak": judge("peak", 1.25, "GB", "<=", None),
        "snr": judge("snr", float("nan"), "dB", ">=", 50),
    }
    document = {"suite": "export", "figures": figures, "environment": environment.describe()}
    path = tmp_path / "run.json"
    path.write_text(json.dumps(document | {"load_before": {"1min": 0.5}}))
    return path


def test_a_section_is_replaced(saved, tmp_path, cli):
    page = tmp_path / "page.md"
    page.write_text(
        "above\n<!-- export -->\n| old |\n<!-- /export -->\nbetween\n<!-- encoder -->\nkept\n<!-- /encoder -->\n"
    )
    assert cli("bench-document", saved, "--output", page).code == 0
    text = page.read_text()
    assert text.startswith("above\n<!-- export -->\n| figure | bar | measured |\n")
    assert "| time of ∣ all | ≤ 10 s | 9.5 s |" in text and "| a ratio | < 0.4 | 0.5: missed |" in text
    assert "| peak | reported | 1.25 GB |" in text and "| snr | ≥ 50 dB | not finite: missed |" in text
    assert "old" not in text and text.endswith("<!-- /export -->\nbetween\n<!-- encoder -->\nkept\n<!-- /encoder -->\n")


@pytest.mark.parametrize("content", ["{}", "[]", "{", '{"suite": "other", "figures": {}}'])
def test_what_is_no_run_is_one_line(content, tmp_path, cli):
    (tmp_path / "run.json").write_text(content)
    (tmp_path / "page.md").write_text("<!-- export -->\n<!-- /export -->\n")
    done = cli("bench-document", tmp_path / "run.json", "--output", tmp_path / "page.md")
    assert done.code == 2 and "run.json: is no saved run" in done.err


def test_the_page_in_the_docs_has_every_section():
    page = (ROOT / "docs/BENCHMARKS.md").read_text()
    for name in ("export", "encoder", "quantization"):
        assert f"<!-- {name} -->\n" in page and f"<!-- /{name} -->" in page
