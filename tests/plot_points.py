"""Points of a plot that crowd each other, for the tests of plots: name -> (x, y)."""

CROWDED = {
    "fp16": (9.5, 55), "palette4": (2.5, 15), "palette6": (3.7, 28), "palette8": (4.9, 40), "palette4-g16": (2.7, 19),
    "palette6-g16": (4.5, 32), "palette8-g16": (7.9, 46), "palette4-g16-scaled": (2.75, 20), "int8": (4.85, 41),
    "int4-b32": (2.8, 17), "min-snr-20": (2.76, 20.1), "min-snr-30": (4, 30.1), "min-snr-40": (5, 40.1),
}  # fmt: skip
