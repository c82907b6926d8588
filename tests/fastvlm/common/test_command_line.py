"""The parser of every command line: all faults at once, other tools' words, verbs that load when they are called."""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastvlm.__main__ import build_parser
from fastvlm.common import arguments
from fastvlm.common.arguments import Parser
from fastvlm.common.cli import run
from fastvlm.common.errors import CheckFailed, UserError
from fastvlm.common.files import Output
from fastvlm.common.verbs import verbs

VERBS = verbs()
ROOT = Path(__file__).parents[3]
HEAVY = {"torch", "transformers", "coremltools", "matplotlib", "scipy", "numba", "timm", "mlx", "huggingface_hub"}


def parser() -> Parser:
    made = Parser(prog="tool")
    made.add_place("--model", metavar="MODEL", help="")
    made.add_argument("--image-file", nargs="+", default=[])
    made.add_argument("--max-new-tokens", type=arguments.whole_number(), default=256)
    made.add_argument("--temperature", type=arguments.number(0), default=0.0)
    made.add_argument("--quant", default="fp16")
    made.add_argument("--shape", choices=("0.5b", "7b"))
    return made


@pytest.mark.parametrize(
    ("type", "accepted", "refused"),
    [
        (arguments.whole_number(), {"1": 1, "12": 12}, ["0", "-1", "1.5", "x", "", "nan"]),
        (arguments.whole_number(64, 64, 128), {"64": 64, "128": 128}, ["0", "65", "192"]),
        (arguments.number(0, 1), {"0": 0.0, "1e-3": 0.001, "1": 1.0}, ["-0.1", "1.1", "nan", "inf", "x"]),
        (arguments.positive, {"0.5": 0.5}, ["0", "-1", "nan", "inf", "x"]),
        (arguments.share, {"0.99": 0.99, "99%": 0.99, "100%": 1.0, "0": 0.0}, ["1.1", "101%", "%", "99%x", "nan"]),
        (arguments.size, {"500MB": 500_000_000, "1.2gb": 1_200_000_000, "8 kB": 8000}, ["500", "0MB", "MB", "-1MB"]),
    ],
)
def test_types_take_their_values_and_refuse_others(type, accepted, refused):
    assert {text: type(text) for text in accepted} == pytest.approx(accepted)
    for text in refused:
        with pytest.raises(argparse.ArgumentTypeError, match="expected"):
            type(text)


def test_all_faults_are_one_error_that_names_the_help_of_the_verb():
    words = "--max-new-tokens 0 --temperature -1 --shape 3b --imagefile=a --foo"
    with pytest.raises(UserError) as caught:
        parser().parse_args(words.split())
    said = str(caught.value)
    for fault in ("--max-new-tokens: got 0", "--temperature: got -1", "--shape: got 3b", "MODEL: is missing",
                  "--imagefile=a: unknown, did you mean --image-file?", "--foo: unknown"):  # fmt: skip
        assert fault in said
    assert said.endswith("(see `tool --help`)") and said.count("`tool --help`") == 1


def test_every_value_of_a_list_and_every_kind_of_refusal_is_told(tmp_path):
    def recipe(text):
        raise UserError(f"{text}: no such recipe")

    made = Parser(prog="tool")
    made.add_argument("--side", type=arguments.whole_number(64, multiple=64), nargs="+")
    made.add_argument("--quant", type=recipe)
    made.add_argument("--output", type=Output(file=True))
    made.add_argument("--level", type=arguments.whole_number(), choices=(1, 2))
    with pytest.raises(UserError) as caught:
        made.parse_args(["--side", "100", "64", "1", "--quant", "int9", "--output", str(tmp_path), "--level", "3"])
    assert str(caught.value).removesuffix(" (see `tool --help`)").split("; ") == [
        "--side: got 100, expected a whole number from 64, a multiple of 64",
        "--side: got 1, expected a whole number from 64, a multiple of 64",
        "--quant: int9: no such recipe",
        f"--output: {tmp_path} is a folder, expected the name of a file",
        "--level: got 3, expected one of 1, 2",
    ]
    assert made.parse_args(["--level", "2"]).level == 2


@pytest.mark.parametrize(
    ("words", "fault"),
    [
        (["doctor", ""], "PATH: is empty"),
        (["predict", ".", "--prompt", ""], "--prompt: is empty"),
        (["generate", "a", "--prompt", " "], "--prompt: is empty"),
        (["generate", "", "--prompt", "a"], "ARTEFACT: is empty: expected a path"),
        (["sweep"], "--checkpoint: is missing"),
        (["export", "--output-dir", "a"], "CHECKPOINT: is missing"),
        (["bundle", "a"], "--app or --output-dir: is missing"),
        (["plan", "--device", "m1"], "ARTEFACT or --shape: is missing: expected"),
        (["estimate", "--device", "m1"], "--shape: is missing: expected"),
        (["export", "{at}", "--output-dir", "{at}/x"], "CHECKPOINT: config-missing: {at}: got"),
        (["export", "--checkpoint", "{at}/none", "--output-dir", "x"], "--checkpoint: path-missing: {at}/none: got"),
    ],
)
def test_what_is_empty_missing_or_no_checkpoint_is_named_first(cli, tmp_path, words, fault):
    answer = cli(*(word.format(at=tmp_path) for word in words))
    assert answer.code == 2 and answer.err.startswith("error: " + fault.format(at=tmp_path))
    assert answer.err.count("is missing") <= 1


def test_a_missing_value_is_one_fault_among_others():
    with pytest.raises(UserError, match=r"--temperature: got -1.*--quant: expected one argument"):
        parser().parse_args(["m", "--temperature", "-1", "--quant"])


def test_checks_of_several_flags_run_on_sound_ones_only():
    made = parser()
    made.check(lambda args: [f"--quant {args.quant}: not with --shape"] if args.shape else [])
    with pytest.raises(UserError, match="not with --shape"):
        made.parse_args(["m", "--shape", "7b"])
    with pytest.raises(UserError) as caught:
        made.parse_args(["m", "--shape", "7b", "--temperature", "x"])
    assert "not with" not in str(caught.value)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("m --max-tokens 5 --temp 0.5 -q int4", {"max_new_tokens": 5, "temperature": 0.5, "quant": "int4"}),
        ("--model m --image a --image-file b c", {"image_file": ["a", "b", "c"]}),
        ("--quant int4 m --quant int8", {"quant": "int8", "model": Path("m")}),  # one value: the last, as everywhere
        ("m --shape 0.5B", {"shape": "0.5b"}),
        ("--temperature 1 m", {"model": Path("m")}),
        ("m", {"image_file": []}),  # the default is not changed by what was parsed before
    ],
)
def test_words_of_other_tools(words, expected):
    made = parser()
    made.parse_args(["x", "--image-file", "before"])
    parsed = made.parse_args(words.split())
    assert expected.items() <= vars(parsed).items()


def test_a_model_is_named_once():
    with pytest.raises(UserError, match="MODEL: given twice"):
        parser().parse_args(["a", "--model", "b"])


def test_an_alias_gives_way_to_a_flag_of_that_name():
    made = parser()
    made.add_argument("--recipe")
    assert made.parse_args(["m", "--recipe", "a"]).recipe == "a"


def test_an_unknown_verb_is_answered_with_the_nearest(cli):
    answer = cli("exprt")
    assert (answer.code, answer.out) == (2, "")
    assert "did you mean export?" in answer.err and answer.err.count("\n") == 1


def test_words_behind_a_verb_are_not_taken_for_verbs(cli):
    assert "got EXPORT, expected" in cli("plan", "--prompt-length", "EXPORT").err


def test_every_fault_with_json_is_a_document_on_stdout(cli, tmp_path):
    for words in (["exprt"], ["export", "--quant"], ["doctor", tmp_path], ["inspect", tmp_path / "none"]):
        answer = cli(*words, "--json")
        document = answer.document
        assert answer.code == document["exit_code"] == 2 and answer.err.endswith(f"error: {document['error']}\n")


def test_stdout_holds_the_document_alone(capsys):
    def build(result):
        made = argparse.ArgumentParser()
        made.add_argument("--json", action="store_true")
        made.set_defaults(run=result)
        return made

    def prints(args):
        print("prose")
        return {"passed": True}

    def fails(args):
        print("prose")
        raise CheckFailed("a figure")

    assert run(lambda: build(prints), ["--json"]) == 0
    assert capsys.readouterr() == ('{"passed": true}\n', "prose\n")
    assert run(lambda: build(fails), ["--json"]) == 1
    assert json.loads(capsys.readouterr().out) == {"error": "a figure", "exit_code": 1}
    assert run(lambda: build(prints), []) == 0
    assert capsys.readouterr() == ("prose\n", "")


def test_a_package_of_an_extra_is_named_with_it(capsys):
    def build():
        made = argparse.ArgumentParser()
        made.set_defaults(run=lambda args: exec("raise ModuleNotFoundError(name='tree_sitter.core')"))
        return made

    assert run(build, []) == 2
    assert "pip install '.[app]'" in capsys.readouterr().err


def test_a_verbs_help_imports_nothing_heavy():
    """Its module is imported only when it is called, and no module that brings a heavy library."""
    code = (
        "import os, sys; from fastvlm.__main__ import build_parser\n"
        f"for name in {[*VERBS]!r}:\n"
        "    if not os.fork():\n"
        "        try: build_parser().parse_args([name, '--help'])\n"
        f"        except SystemExit: print(name, *({HEAVY!r} & sys.modules.keys()), file=sys.stderr)\n"
        "        sys.stdout.flush(); os._exit(0)\n"
        "    os.wait()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.stderr.split() == [*VERBS] and done.stdout.count("usage: ") == len(VERBS)


def test_the_command_itself_imports_no_verb():
    code = "import sys, fastvlm.__main__ as m; m.build_parser().format_help(); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    targets = {verb.target.partition(":")[0] for verb in VERBS.values()}
    assert not targets & set(done.stdout.split()) and "numpy" not in done.stdout.split()


@pytest.mark.parametrize("columns", [60, 200])
def test_every_verb_is_in_the_help_once(columns, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    lines = build_parser().format_help().splitlines()
    assert [line.split()[0] for line in lines if line.startswith("  ") and line[2] != " "].count("export") == 1
    assert {line.split()[0] for line in lines if line.startswith("  ") and line[2] != " "} >= set(VERBS)
    assert max(map(len, lines)) <= min(columns, 100)


def test_without_its_libraries_the_command_says_where_to_go(tmp_path):
    """By an isolated Python that has the standard library only."""
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); import runpy; runpy.run_module('fastvlm', run_name='__main__')"
    )
    done = subprocess.run(
        [sys.executable, "-S", "-I", "-c", code], capture_output=True, text=True, check=False, env={**os.environ}
    )
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1 and "make setup" in done.stderr
