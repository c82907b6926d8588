"""The Makefile: what it names, and what it asks for. Nothing is installed: its environment counts as ready."""

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def make(*words: str) -> subprocess.CompletedProcess[str]:
    command = ["make", "-o", "nowhere/.ready", "VENV=nowhere", "EXTRAS=", *words]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)


@pytest.mark.parametrize(
    ("quant", "name"), [("fit:400MB", "fit-400MB"), ("fit:5.36bpw", "fit-5.36bpw"), ("a/b/mine.json", "mine")]
)
def test_an_artefacts_name_has_no_colon_and_parity_goes_where_exports_page_went(quant, name):
    folder = f"build/demo_checkpoint-{name}"
    exported, compared = (make("-n", target, f"QUANT={quant}").stdout for target in ("export", "parity"))
    assert f'--output-dir "{folder}" --quant "{quant}"' in exported
    assert f'"{folder}-parity.html"' in exported and f'"{folder}-parity.html"' in compared


def test_an_adapter_goes_to_every_task_of_a_checkpoint_and_into_the_artefacts_name():
    for target in ("export", "parity", "sweep", "ranges", "bench"):
        assert '--adapter "a/my lora/"' in make("-n", target, "ADAPTER=a/my lora/").stdout
        assert "--adapter" not in make("-n", target).stdout
    assert '--output-dir "build/demo_checkpoint-lora-fp16"' in make("-n", "export", "ADAPTER=a/lora/").stdout


@pytest.mark.parametrize(("target", "variable"), [("app", "APP="), ("plan", "DEVICE=")])
def test_what_is_missing_is_named(target, variable):
    done = make(target)
    assert done.returncode == 2 and f"make {target} {variable}" in done.stderr


def test_every_target_is_in_the_help():
    phony = next(line for line in (ROOT / "Makefile").read_text().splitlines() if line.startswith(".PHONY: "))
    text = make("help").stdout
    assert [name for name in phony.split()[1:] if f"make {name} " not in text] == []
