"""The argparse types, and a parser that reports all refused values at once."""

import pytest

from fastvlm.common import cli
from fastvlm.common.arguments import positive, whole_number
from fastvlm.common.errors import UserError
from fastvlm.common.files import Output


def refuse(text):
    raise UserError(f"{text}: no such recipe")


@pytest.fixture
def parser():
    parser = cli.Parser(prog="test")
    parser.add_argument("--count", type=whole_number())
    parser.add_argument("--side", type=whole_number(64, multiple=64), nargs="+")
    parser.add_argument("--budget", type=positive)
    parser.add_argument("--output", type=Output(file=True))
    parser.add_argument("--quant", type=refuse)
    parser.add_argument("--level", type=whole_number(), choices=(1, 2))
    return parser


def test_usable_values_are_converted(parser, tmp_path):
    given = ["--count", "1", "--side", "64", "128", "--budget", "0.5", "--output", str(tmp_path / "a"), "--level", "2"]
    values = vars(parser.parse_args(given))
    assert values == {"count": 1, "side": [64, 128], "budget": 0.5, "output": tmp_path / "a", "quant": None, "level": 2}


@pytest.mark.parametrize("flag, text", [("--count", text) for text in ("0", "-1", "1.5", "a", "")]
                         + [("--side", text) for text in ("0", "63", "100")]
                         + [("--budget", text) for text in ("0", "-1", "nan", "inf", "a")])  # fmt: skip
def test_each_unusable_value_is_refused(flag, text, parser):
    with pytest.raises(UserError, match=rf"^{flag}: got {text}, expected a"):
        parser.parse_args([flag, text])


def test_all_refused_values_are_told_at_once(parser, tmp_path):
    given = ["--side", "100", "64", "1", "--quant", "int9", "--output", str(tmp_path), "--level", "0", "--count", "0"]
    with pytest.raises(UserError) as error:
        parser.parse_args(given)
    assert str(error.value).split("; ") == [
        "--side: got 100, expected a whole number from 64, a multiple of 64",
        "--side: got 1, expected a whole number from 64, a multiple of 64",
        "--quant: int9: no such recipe",
        f"--output: {tmp_path} is a folder, expected the name of a file",
        "--level: got 0, expected a whole number from 1",
        "--count: got 0, expected a whole number from 1",
    ]
    parser.parse_args(["--count", "3"])  # what was refused before is forgotten
