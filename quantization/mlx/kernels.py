"""The loops over values behind `affine` and `floating`, compiled by numba: each group of a weight is read once.

Values come as the bits of their type (float16 and bfloat16 as uint16, float32 as uint32) with its number in `KINDS`, so
that one machine code serves them all. The kernels release the GIL: threads of the caller's run them side by side.
"""

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from fastvlm.common import threads
from quantization.compiled import kernel, part

KINDS = {"bfloat16": 0, "float16": 1, "float32": 2}
_BFLOAT16, _FLOAT16, _FLOAT32 = KINDS.values()

_LEAST = 1 << 20  # values that are worth a thread
_BLOCK = 2048  # values on their way at once: 8 KiB, in a core's first cache; whole groups of any size
U8, U16, U32, U64, I32, F32 = np.uint8, np.uint16, np.uint32, np.uint64, np.int32, np.float32
_SIGN, _MAGNITUDE, _INFINITY, _NAN = U32(0x80000000), U32(0x7FFFFFFF), U32(0x7F800000), U32(0x7FC00000)
_HALF_INFINITY, _HALF_NORMAL = U32(0x47800000), U32(0x38800000)  # float16's, as float32: 65536, 2^-14
_HALF_STEP = F32(0.5)  # a float32 of this exponent has float16's smallest value, 2^-24, as its last bit
_INTEGER_STEP = F32(1 << 23)  # and one of this exponent 1
_E4M3_STEP, _E4M3_NORMAL = F32(1 << 14), U32(0x3C800000)  # 2^-9, E4M3's smallest value; 2^-6
_SMALLEST_SCALE = F32(1e-7)  # mlx's eps: keeps a group of equal values from dividing by zero
_HUGE = U32(0x4B800000)  # 2^24: from here on, float32 differences to E2M1's values are no longer exact
_BIAS = 127  # of a power of two as it is stored
_NO_WORDS = np.empty(0, U32)
_E2M1 = np.array([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], F32)


def spread(work: Callable[[int, int], Any], rows: int, columns: int) -> list[Any]:
    """`work(start, stop)` for all rows, on the cores that this process may use if there is enough for them."""
    count = max(1, min(threads.count(), rows, rows * columns // _LEAST))
    if count == 1:
        return [work(0, rows)]
    edges = [rows * number // count for number in range(count + 1)]
    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(work, edges, edges[1:]))


def greatest(magnitudes: list[float]) -> float:
    """The largest of what `spread` returns, NaN above all."""
    return math.nan if any(map(math.isnan, magnitudes)) else max(magnitudes)


# Integers are wrapped again after every operation: numba makes 64 bits of each result, which halves the vectors. Sums
# that are indexes are unsigned: it asks of the others whether they count from the end, and that prevents vectors.


@part
def _float(bits: Any) -> Any:
    return U32(bits).view(F32)


@part
def _bits(value: Any) -> Any:
    return F32(value).view(U32)


@part
def _from_half(half: Any) -> Any:
    """A float16's bits to the float32 of its value; infinity and NaN become larger than any float16."""
    bits = U32(half)
    magnitude = _float(U32((bits & U32(0x7FFF)) << U32(13))) * F32(2.0**112)
    return _float(U32(_bits(magnitude) | U32((bits & U32(0x8000)) << U32(16))))


@part
def _rounded(value: Any, kind: Any) -> Any:
    """A float32 to nearest and even in the precision of `kind`, still as float32."""
    bits = _bits(value)
    sign, size = U32(bits & _SIGN), U32(bits & _MAGNITUDE)
    if kind == _FLOAT16:
        normal = U32(U32(size + U32(0xFFF) + U32(U32(size >> U32(13)) & U32(1))) & U32(0xFFFFE000))
        normal = normal if normal < _HALF_INFINITY else _INFINITY
        normal = normal if size <= _INFINITY else _NAN
        small = _bits(F32(_float(size) + _HALF_STEP) - _HALF_STEP)
        return _float(U32((small if size < _HALF_NORMAL else normal) | sign))
    if kind == _BFLOAT16:
        near = U32(U32(size + U32(0x7FFF) + U32(U32(size >> U32(16)) & U32(1))) & U32(0xFFFF0000))
        return _float(U32((near if size <= _INFINITY else _NAN) | sign))
    return value


@part
def _stored(value: Any, kind: Any) -> Any:
    """The bits of a float32 that is already in the precision of `kind`."""
    bits = _bits(value)
    if kind == _FLOAT16:
        sign, size = U32(U32(bits >> U32(16)) & U32(0x8000)), U32(bits & _MAGNITUDE)
        normal = U32(U32(size - U32(0x38000000)) >> U32(13))
        small = U32(_bits(F32(_float(size) + _HALF_STEP)) - U32(0x3F000000))
        half = small if size < _HALF_NORMAL else normal
        half = U32(0x7C00) if size >= _HALF_INFINITY else half
        half = U32(0x7E00) if size > _INFINITY else half
        return U32(half | sign)
    if kind == _BFLOAT16:
        return U32(bits >> U32(16))
    return bits


@part
def _round(values: Any, kind: Any) -> None:
    """Round float32 values in place to the precision of `kind`."""
    if kind == _FLOAT16:
        for i in range(values.size):
            values[i] = _rounded(values[i], _FLOAT16)
    elif kind == _BFLOAT16:
        for i in range(values.size):
            values[i] = _rounded(values[i], _BFLOAT16)


@part
def _load(source: Any, kind: Any, to: Any, values: Any) -> None:
    """Fill `values` (float32) with `source`'s, in the precision of `to`."""
    if kind == _BFLOAT16:
        for i in range(values.size):
            values[i] = _float(U32(U32(source[i]) << U32(16)))
    elif kind == _FLOAT16:
        for i in range(values.size):
            values[i] = _from_half(source[i])
    else:
        for i in range(values.size):
            values[i] = _float(source[i])
    if to != kind:
        _round(values, to)


@part
def _store(values: Any, kind: Any, target: Any) -> None:
    """The inverse of `_load`, of values already in the precision of `kind`."""
    if kind == _BFLOAT16:
        for i in range(values.size):
            target[i] = _stored(values[i], _BFLOAT16)
    elif kind == _FLOAT16:
        for i in range(values.size):
            target[i] = _stored(values[i], _FLOAT16)
    else:
        for i in range(values.size):
            target[i] = _bits(values[i])


@part
def _largest(values: Any, start: Any, count: Any) -> Any:
    """The bits of the largest magnitude: as integers, floats without their signs keep their order, NaN above all."""
    largest, place = U32(0), U64(start)
    for i in range(count):
        size = U32(_bits(values[place + U64(i)]) & _MAGNITUDE)
        largest = size if size > largest else largest
    return largest


@part
def _ordered(bits: Any) -> Any:
    """Integers in the order of the floats whose bits they are; its own inverse."""
    number = I32(bits)
    return I32(number ^ I32(I32(number >> I32(31)) & I32(0x7FFFFFFF)))


@part
def _masks(bits: Any) -> Any:
    """Masks for a word of eight codes: fields of one, two and four codes; and the distance between neighbours."""
    first = U64(U64(0x0001000100010001) * U64((1 << bits) - 1))
    second = U64(U64(0x0000000100000001) * U64((1 << 2 * bits) - 1))
    return first, second, U64((1 << 4 * bits) - 1), U64(8 - bits)


@part
def _pack(codes: Any, bits: Any, stream: Any) -> None:
    """Codes (uint8, a multiple of 8) to a little-endian bit stream (uint8), the first in the lowest bits.

    In a word of eight codes, neighbours are moved together three times: eight fields of `bits`, four, two, one.
    """
    if bits == 8:
        for i in range(codes.size):
            stream[i] = codes[i]
        return
    words = codes.view(U64)
    first, second, third, by = _masks(bits)
    if bits == 4:
        out = stream.view(U32)
        for i in range(words.size):
            word = words[i]
            word = (word & first) | ((word >> by) & U64(first << U64(4)))
            word = (word & second) | ((word >> U64(8)) & U64(second << U64(8)))
            out[i] = U32((word & third) | ((word >> U64(16)) & U64(third << U64(16))))
        return
    for i in range(words.size):
        word = words[i]
        word = (word & first) | ((word >> by) & U64(first << U64(bits)))
        word = (word & second) | ((word >> U64(2 * by)) & U64(second << U64(2 * bits)))
        word = (word & third) | ((word >> U64(4 * by)) & U64(third << U64(4 * bits)))
        for byte in range(bits):
            stream[i * bits + byte] = U8(word >> U64(8 * byte))


@part
def _unpack(stream: Any, bits: Any, codes: Any) -> None:
    """The inverse of `_pack`."""
    if bits == 8:
        for i in range(codes.size):
            codes[i] = stream[i]
        return
    words = codes.view(U64)
    first, second, third, by = _masks(bits)
    half = stream.view(U32) if bits == 4 else _NO_WORDS
    for i in range(words.size):
        word = U64(0)
        if bits == 4:
            word = U64(half[i])
        else:
            for byte in range(bits):
                word |= U64(stream[i * bits + byte]) << U64(8 * byte)
        word = (word & third) | ((word << U64(4 * by)) & U64(third << U64(32)))
        word = (word & second) | ((word << U64(2 * by)) & U64(second << U64(16)))
        words[i] = (word & first) | ((word << by) & U64(first << U64(8)))


@kernel
def pack(codes: Any, bits: Any, stream: Any) -> None:
    _pack(codes, bits, stream)


@kernel
def cast(source: Any, kind: Any, to: Any, target: Any) -> Any:
    """Values from one type to another; returns the largest magnitude of the results, as float32."""
    values, most = np.empty(_BLOCK, F32), U32(0)
    for start in range(0, source.size, _BLOCK):
        part = values[: min(_BLOCK, source.size - start)]
        _load(source[start : start + part.size], kind, to, part)
        _store(part, to, target[start : start + part.size])
        largest = _largest(part, 0, part.size)
        most = largest if largest > most else most
    return _float(most)


@part
def _edges(values: Any, start: Any, count: Any) -> Any:
    """Least and greatest of some values, as `_ordered` integers."""
    least, greatest, place = I32(0x7FFFFFFF), I32(-0x80000000), U64(start)
    for i in range(count):
        ordered = _ordered(_bits(values[place + U64(i)]))
        least = ordered if ordered < least else least
        greatest = ordered if ordered > greatest else greatest
    return least, greatest


@part
def _codes(values: Any, start: Any, scale: Any, bias: Any, bins: Any, codes: Any) -> None:
    """The codes of 32 values."""
    place = U64(start)
    for i in range(32):
        code = F32(F32(values[place + U64(i)] - bias) / scale)
        code = code if code > F32(0) else F32(0)
        code = code if code < bins else bins
        codes[place + U64(i)] = U8(_bits(F32(code + _INTEGER_STEP)))  # the addition rounds to nearest and even


@kernel
def affine_quantize(
    source: Any, kind: Any, to: Any, bits: Any, group: Any, stream: Any, scales: Any, biases: Any
) -> Any:
    """Groups of values to codes, scales and biases in the type `to`; returns the largest magnitude in it, float32."""
    buffer, codes = np.empty(_BLOCK, F32), np.empty(_BLOCK, U8)
    bins, most = F32((1 << bits) - 1), U32(0)
    for first in range(0, source.size, _BLOCK):
        values = buffer[: min(_BLOCK, source.size - first)]
        _load(source[first : first + values.size], kind, to, values)
        for start in range(0, values.size, group):
            least, greatest = _edges(values, start, group)
            low, high = _float(_ordered(least)), _float(_ordered(greatest))
            most = max(most, U32(_bits(low) & _MAGNITUDE), U32(_bits(high) & _MAGNITUDE))
            # the edge of larger magnitude is representable exactly, and so is zero
            from_low = abs(low) > abs(high)
            scale = F32(F32(high - low) / bins)
            scale = scale if scale > _SMALLEST_SCALE else _SMALLEST_SCALE
            scale = scale if from_low else -scale
            edge = low if from_low else high
            steps = F32(np.rint(F32(edge / scale)))
            bias = F32(0)
            if steps != F32(0):
                scale, bias = F32(edge / steps), edge
            number = (first + start) // group
            scales[number], biases[number] = _stored(_rounded(scale, to), to), _stored(_rounded(bias, to), to)
            for unit in range(start, start + group, 32):
                _codes(values, unit, scale, bias, bins, codes)
        _pack(codes[: values.size], bits, stream[first * bits // 8 : (first + values.size) * bits // 8])
    return _float(most)


@kernel
def affine_dequantize(
    stream: Any, scales: Any, biases: Any, kind: Any, bits: Any, group: Any, as_float32: Any, target: Any
) -> None:
    """Product and sum are rounded to the scales' type `kind` one after the other; `target` has it, or float32."""
    buffer, codes = np.empty(_BLOCK, F32), np.empty(_BLOCK, U8)
    factors, terms = np.empty(_BLOCK // 32, F32), np.empty(_BLOCK // 32, F32)
    into = _FLOAT32 if as_float32 else kind
    for first in range(0, target.size, _BLOCK):
        values = buffer[: min(_BLOCK, target.size - first)]
        groups = slice(first // group, (first + values.size) // group)
        factor, term = factors[: groups.stop - groups.start], terms[: groups.stop - groups.start]
        _load(scales[groups], kind, kind, factor)
        _load(biases[groups], kind, kind, term)
        _unpack(stream[first * bits // 8 : (first + values.size) * bits // 8], bits, codes[: values.size])
        for number in range(factor.size):
            place, scale = U64(number * group), factor[number]
            for i in range(group):
                values[place + U64(i)] = F32(codes[place + U64(i)]) * scale
        _round(values, kind)
        for number in range(factor.size):
            place, bias = U64(number * group), term[number]
            for i in range(group):
                values[place + U64(i)] += bias
        _round(values, kind)
        _store(values, into, target[first : first + values.size])


@part
def _e4m3(value: Any) -> Any:
    """A float32 to E4M3's code, to nearest and even; what is larger becomes the largest."""
    bits = _bits(value)
    sign, size = U32(U32(bits >> U32(24)) & U32(0x80)), U32(bits & _MAGNITUDE)
    size = size if size < U32(0x43E00000) else U32(0x43E00000)  # 448
    normal = U32(U32(U32(size + U32(0x7FFFF) + U32(U32(size >> U32(20)) & U32(1))) >> U32(20)) - U32(120 << 3))
    small = U32(_bits(F32(_float(size) + _E4M3_STEP)) & U32(0xF))
    return U32((small if size < _E4M3_NORMAL else normal) | sign)


@part
def _e2m1(value: Any) -> Any:
    """A float32 to E2M1's code: to nearest, ties towards zero; it has no negative zero."""
    size, code = abs(value), U32(0)
    # how many of the middles between its values are below
    for middle in (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0):
        code = U32(code + U32(size > F32(middle)))
    return U32(code + (U32(8) if value < F32(0) and code > U32(0) else U32(0)))


@part
def _e2m1_by_distance(value: Any) -> Any:
    """The same, as MLX computes it: the first value of the smallest difference, rounded to float32."""
    best, code = abs(value), 0
    for number in range(1, 16):
        entry = _E2M1[number & 7] if number < 8 else -_E2M1[number & 7]
        distance = abs(F32(value - entry))
        if distance < best:
            best, code = distance, number
    return U32(code)


@part
def _power(scale: Any) -> Any:
    """The exponent of the smallest power of two that is no smaller than a scale of 0 or more; 0 for 0."""
    mantissa, exponent = math.frexp(scale)
    return exponent - 1 if mantissa == 0.5 else exponent


@kernel
def floating_quantize(
    source: Any, kind: Any, to: Any, bits: Any, group: Any, power: Any, e4m3: Any, stream: Any, scales: Any
) -> Any:
    """Groups of values, in the type `to`, to E2M1 or E4M3 and scales; returns their largest magnitude, as float32.

    `power`: the scales are powers of two; else E4M3, whose 256 values are `e4m3`.
    """
    buffer, codes = np.empty(_BLOCK, F32), np.empty(_BLOCK, U8)
    top, most = F32(6.0 if bits == 4 else 448.0), U32(0)
    for first in range(0, source.size, _BLOCK):
        values = buffer[: min(_BLOCK, source.size - first)]
        _load(source[first : first + values.size], kind, to, values)
        greatest = U32(0)
        for start in range(0, values.size, group):
            largest = _largest(values, start, group)
            greatest = max(greatest, largest)
            scale, number = _rounded(F32(_float(largest) / top), to), (first + start) // group
            if power:
                exponent = _power(scale)
                scales[number], divisor = U8(exponent + _BIAS), F32(math.ldexp(1.0, exponent))
            else:
                code = _e4m3(scale)
                scales[number], divisor = code, e4m3[code]
                divisor = F32(np.inf) if divisor == F32(0) else divisor  # what would be divided by zero becomes zero
            place = U64(start)
            for i in range(group):
                values[place + U64(i)] = F32(values[place + U64(i)] / divisor)
        _round(values, to)
        if bits == 8:
            for i in range(values.size):
                codes[i] = _e4m3(values[i])
        elif greatest > _HUGE:
            for i in range(values.size):
                codes[i] = _e2m1_by_distance(values[i])
        else:
            for i in range(values.size):
                codes[i] = _e2m1(values[i])
        _pack(codes[: values.size], bits, stream[first * bits // 8 : (first + values.size) * bits // 8])
        most = max(most, greatest)
    return _float(most)


@kernel
def floating_dequantize(
    stream: Any, scales: Any, factors: Any, table: Any, kind: Any, bits: Any, group: Any, as_float32: Any, target: Any
) -> None:
    """Values of codes and scales (`table` and `factors`, float32) multiplied, and rounded to the type `kind`."""
    buffer, codes = np.empty(_BLOCK, F32), np.empty(_BLOCK, U8)
    into = _FLOAT32 if as_float32 else kind
    for first in range(0, target.size, _BLOCK):
        values = buffer[: min(_BLOCK, target.size - first)]
        _unpack(stream[first * bits // 8 : (first + values.size) * bits // 8], bits, codes[: values.size])
        for unit in range(0, values.size, 16):
            factor, place = factors[scales[(first + unit) // group]], U64(unit)
            for i in range(16):
                values[place + U64(i)] = table[codes[place + U64(i)]] * factor
        _round(values, kind)
        _store(values, into, target[first : first + values.size])
