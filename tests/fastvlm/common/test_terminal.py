"""Control characters from untrusted text never reach the terminal; JSON stays the same document."""

import argparse
import io
import json
import sys

import pytest
from rich.progress import Progress, TextColumn
from rich.table import Table

from fastvlm.common import cli
from fastvlm.common.errors import UserError
from fastvlm.common.terminal import Console, neutral, plain_streams, print_table

HOSTILE = "a\x1b[2J\x1b]0;title\x07b\rc\x9b31md\u202ee\x00\x7f"
CONTROLS = [chr(number) for number in range(0xA0) if chr(number) not in "\t\n" and not chr(number).isprintable()]


def run(verb) -> int:
    def build():
        parser = argparse.ArgumentParser()
        parser.add_argument("--json", action="store_true")
        parser.set_defaults(run=verb)
        return parser

    return cli.run(build, ["--json"])


def test_neutral_text():
    assert neutral(HOSTILE) == r"a\u001b[2J\u001b]0;title\u0007b\u000dc\u009b31md\u202ee\u0000\u007f"
    assert neutral(neutral(HOSTILE)) == neutral(HOSTILE)
    kept = "tab\tline\nCafé 東京 🙂 עברית \\u001b"
    assert neutral(kept) == kept
    assert not any(control in neutral("".join(CONTROLS)) for control in CONTROLS) and len(CONTROLS) == 63


def test_everything_that_a_command_prints(capsys):
    def verb(args):
        print(HOSTILE)
        cli.log(HOSTILE)
        with cli.progress(HOSTILE):
            table = Table(HOSTILE)
            table.add_row(HOSTILE)
            Console(highlight=False, width=200).print(table)
        return {HOSTILE: HOSTILE}

    assert run(verb) == 0
    out, err = capsys.readouterr()
    assert not any(control in out + err for control in [*CONTROLS, "\u202e"])
    assert json.loads(out.splitlines()[-1]) == {HOSTILE: HOSTILE}

    def failing(args):
        raise UserError(f"{HOSTILE}: no such file")

    assert run(failing) == 2
    assert capsys.readouterr().err == f"error: {neutral(HOSTILE.replace(chr(13), '; '))}: no such file\n"


def test_only_the_console_writes_escapes(monkeypatch: pytest.MonkeyPatch):
    """A terminal still gets colours and bars; what stands in them is neutral."""
    terminal = io.StringIO()
    terminal.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setenv("TERM", "xterm-256color")
    with plain_streams():
        console = Console()
        console.print(HOSTILE, style="red", markup=False)
        with Progress(TextColumn("{task.description}", markup=False), console=console) as bar:
            bar.add_task(HOSTILE)
            bar.refresh()
        print("\x1b[31m")
    text = terminal.getvalue()
    assert "\x1b[31m" in text and "\x1b[?25l" in text  # red, and the cursor hidden
    for part in ("\x1b[2J", "\x1b]0", "\x07", "\x9b", "\u202e"):
        assert part not in text
    assert text.endswith("\\u001b[31m\n")


def test_what_an_encoding_lacks_is_written_out(monkeypatch: pytest.MonkeyPatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    with plain_streams():
        print("a \ud800 × …")
        Console().print("b \udcff")
        sys.stdout.flush()
    assert raw.getvalue() == b"a \\ud800 \\xd7 \\u2026\nb \\udcff\n"


ROWS = [("one [red]", "a long text that has to be wrapped somewhere, " * 3, "1.234"), None, ("two", "short", "5")]


@pytest.mark.parametrize("columns", [None, 60, 120])
def test_a_table_fits_what_columns_says(monkeypatch: pytest.MonkeyPatch, capsys, columns):
    if columns:
        monkeypatch.setenv("COLUMNS", str(columns))
    else:
        monkeypatch.delenv("COLUMNS", raising=False)
    print_table("a title", ("name", "text", "number"), ROWS, numbers=("number",))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].strip() == "a title" and max(map(len, lines)) <= (columns or 80)
    assert "[red]" in "".join(lines) and any(line.rstrip().endswith("1.234") for line in lines)


def test_a_table_that_does_not_fit_becomes_blocks(monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setenv("COLUMNS", "40")
    heads = [f"figure {number}" for number in range(8)]
    print_table("wide", ("name", *heads), [("one", *("1.2345 GB" for _ in heads)), ("two", *[""] * 7, "9")], heads)
    lines = capsys.readouterr().out.splitlines()
    assert lines[:3] == ["wide", "one", "  figure 0 1.2345 GB · figure 1 1.2345"] and max(map(len, lines)) <= 40
    assert lines[-2:] == ["two", "  figure 7 9"]


@pytest.mark.parametrize("columns", range(24, 160, 4))
def test_a_table_keeps_its_units_its_names_and_every_word(monkeypatch: pytest.MonkeyPatch, capsys, columns):
    """Also where every word would find room, but not every figure."""
    monkeypatch.setenv("COLUMNS", str(columns))
    row = ("int4 palette6", "a_name.without.blanks", "12.5 GB", "1,234 MB", "a text of many words " * 3)
    print_table("sizes", ("point", "weights", "memory", "size", "why"), [row], ("memory", "size"))
    out = capsys.readouterr().out
    words = out.split()
    assert words.count("words") == 3 and not {*" ".join(row).split()} - {*words}
    assert not [line for line in out.splitlines() if line.endswith(" ") or len(line) > columns]
    if "─" in out:
        assert "12.5 GB" in out and "1,234 MB" in out
