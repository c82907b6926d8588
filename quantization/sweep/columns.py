"""The figures of a sweep's points: their names, units and trade-offs, and how they are shown."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from quantization.sweep.engine import UNCOMPRESSED

KL, AGREEMENT = "answer_kl_mean", "same_answers"  # the figures that quality is judged by
_SCALES = {"MB": 1e-6, "GB": 1e-9, "%": 100.0, "ms": 1e3}

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Column:
    """A figure of a point. `unit` is how it is shown; `more` whether more of it is better."""

    key: str
    label: str
    unit: str
    more: bool = False
    timing: bool = False

    @property
    def scale(self) -> float:
        """The factor that turns a value into `unit`."""
        return _SCALES.get(self.unit, 1.0)


COLUMNS = (
    Column("bytes", "size", "MB"),
    Column("bytes_language", "language model", "MB"),
    Column("bytes_vision", "encoder", "MB"),
    Column("bits_per_weight", "bits a weight", "bits"),
    Column(KL, "KL of the answers, nats a token", ""),
    Column("answer_top1", "same tokens", "%", more=True),
    Column(AGREEMENT, "same answers", "%", more=True),
    Column("exact", "right answers", "%", more=True),
    Column("perplexity_ratio", "perplexity / reference's", ""),
    Column("ttft_s", "TTFT", "ms", timing=True),
    Column("peak_bytes", "peak memory", "GB", timing=True),
    Column("seconds", "took", "s", timing=True),
)
_BY_KEY = {column.key: column for column in COLUMNS}
# The trade-offs that are drawn, and the two figures that each trades.
FRONTS = {
    "size and KL": ("bytes", KL),
    "size and answers": ("bytes", AGREEMENT),
    "size and TTFT": ("bytes", "ttft_s"),
    "TTFT and answers": ("ttft_s", AGREEMENT),
}


def column(key: str) -> Column:
    """The column of a figure."""
    return _BY_KEY[key]


def label(row: Row, rows: Sequence[Row]) -> str:
    """A point's name without what all points of the sweep share."""
    forms, sizes = {point["vision_quant"] for point in rows}, {point["resolution"] for point in rows}
    form = f" with {row['vision_quant']}" if forms != {UNCOMPRESSED} else ""
    return row["recipe"] + form + (f" at {row['resolution']}" if len(sizes) > 1 else "")


def shown(value: float | None, unit: str) -> str:
    """A figure for people: three or four digits, shares in percent, sizes in decimal units."""
    if value is None:
        return "–"
    number = value * _SCALES.get(unit, 1.0)
    if unit == "%":
        return f"{number:.4g} %"
    text = f"{number:.3g}" if number < 1000 else f"{number:,.0f}"
    return f"{text} {unit}" if unit not in ("", "bits") else text
