"""Terminal output as plain text: control characters of names, templates, servers and answers are shown, not obeyed.

`plain_streams` puts this before stdout and stderr for everything that a command prints. Only `Console` writes the
escapes of its own colours and bars.
"""

import re
import sys
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from typing import IO, Any

from rich import box
from rich.cells import cell_len
from rich.console import Console as RichConsole
from rich.console import ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

# All but tab and newline of C0, delete and C1 (ECMA-48), and the marks that turn text around (Unicode TR 9). Written
# as JSON writes them, so that a printed document stays the same document.
_CONTROLS = {*range(0x20), *range(0x7F, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A)} - {9, 10}
_SHOWN = {number: f"\\u{number:04x}" for number in _CONTROLS}

_READABLE = 16  # characters that a column of text has at least, where a cell is that long
_GAP = 3  # characters between two columns


def neutral(text: str) -> str:
    """`text` with its control characters written out, as `\\u001b`."""
    return text.translate(_SHOWN)


class _Encodable:
    """A text stream that writes what its encoding lacks as `\\udc80` or `\\u2026` instead of failing."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except UnicodeEncodeError as error:
            return self._stream.write(text.encode(error.encoding, "backslashreplace").decode(error.encoding))

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class _Plain(_Encodable):
    """Neutral text only; `styled` is the same stream for who writes escapes of his own."""

    def __init__(self, stream: IO[str]) -> None:
        super().__init__(stream)
        self.styled = _Encodable(stream)

    def write(self, text: str) -> int:
        return super().write(neutral(text))


@contextmanager
def plain_streams() -> Iterator[None]:
    """Print neutral text to stdout and stderr, those of them that are there."""
    with ExitStack() as stack:
        if sys.stdout is not None:
            stack.enter_context(redirect_stdout(_Plain(sys.stdout)))  # type: ignore[type-var]
        if sys.stderr is not None:
            stack.enter_context(redirect_stderr(_Plain(sys.stderr)))  # type: ignore[type-var]
        yield


class Console(RichConsole):
    """rich's console, for tables and progress: what is in them is neutral, and a reader that left is an OSError."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(neutral(segment.text), segment.style)

    @property
    def file(self) -> IO[str]:
        stream = super().file
        return getattr(stream, "styled", stream)

    @file.setter
    def file(self, stream: IO[str]) -> None:
        self._file = stream

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


def mark(passed: bool | None) -> Text:
    """The sign of a check's outcome: a green tick, a red cross, or a dash for what was not judged."""
    if passed is None:
        return Text("–")
    return Text("✓", "green") if passed else Text("✗", "red")


def print_table(
    title: str, columns: Sequence[str], rows: Iterable[Sequence[str | Text] | None], numbers: Collection[str] = (),
    console: Console | None = None,
) -> None:  # fmt: skip
    """Print a table on stdout, as wide as the terminal, `COLUMNS`, or 80 characters.

    Text is printed as it is, without markup; a row that is None separates sections. The columns named in `numbers` are
    aligned to the right and never wrapped, others only where a cell is longer than 16 characters. Where the table does
    not fit, each row becomes a block: its first cell, and below it the others with their columns' names.
    """
    console = console or Console(highlight=False)
    cells = [
        None if row is None else [Text(cell) if isinstance(cell, str) else cell for cell in row] for row in rows
    ]  # fmt: skip
    heads = [Text(column) for column in columns]
    # rich itself narrows columns below their longest word, and crops what is not wrapped
    sizes = [[_size(row[index]) for row in (heads, *filter(None, cells))] for index in range(len(columns))]
    widest = [max(line for _, line in column) for column in sizes]
    widths = [
        most if name in numbers else max(min(most, _READABLE), *(word for word, _ in column))
        for name, most, column in zip(columns, widest, sizes)
    ]
    spare = console.width - sum(widths) - _GAP * (len(columns) - 1)
    if spare < 0:
        console.print(Text(title, "bold"))
        _print_blocks(console, columns, [row for row in cells if row])
        return
    for left, index in enumerate(sorted(range(len(columns)), key=lambda index: widest[index] - widths[index])):
        more = min(widest[index] - widths[index], spare // (len(columns) - left))
        widths[index], spare = widths[index] + more, spare - more
    table = Table(title=Text(title, "bold"), title_justify="left", box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for column, width in zip(heads, widths):
        table.add_column(column, justify="right" if column.plain in numbers else "left", overflow="fold", width=width)
    for row in cells:
        if row is None:
            table.add_section()
        else:
            table.add_row(*row)
    with console.capture() as printed:
        console.print(table)
    console.file.write(re.sub(" +$", "", printed.get(), flags=re.MULTILINE))


def _size(text: Text) -> tuple[int, int]:
    """The widths of the longest word and of the longest line."""
    plain = neutral(text.plain)
    return max(map(cell_len, plain.split()), default=0), max(map(cell_len, plain.splitlines()), default=0)


def _print_blocks(console: Console, columns: Sequence[str], rows: Sequence[Sequence[Text]]) -> None:
    for first, *others in rows:
        console.print(first)
        cells = [Text.assemble((f"{column} ", "dim"), cell) for column, cell in zip(columns[1:], others) if cell.plain]
        for line in Text(" · ").join(cells).wrap(console, max(console.width - 2, 20)):
            line.rstrip()
            console.print(Text("  ") + line)
