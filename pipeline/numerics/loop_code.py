"""The element loops as instructions: products of differences in tiles, combination in strips.

Owns how the loops are blocked; `compiled` hands them whole blocks and their memory. Legend: P points, N points
without the reference, K elements of a block, Q pairs of points, L lanes.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np

from pipeline.numerics.element_code import Element, loaded, rounded
from pipeline.numerics.vector_code import compiled_function, compiled_once, processor
from pipeline.numerics.vector_text import (
    DOUBLES,
    INTS,
    LANES,
    Function,
    Value,
    Variable,
)

# Elements of a block: a row of float64 differences is 2 KiB, so that those of a dozen models stay in the first-level
# cache; half of it and twice as much were no faster.
BLOCK = 256
# Elements whose combination is kept in registers at a time.
STRIP = 32
# Twelve sums, three values held and one that passes by fill 16 registers.
_ROWS, _COLUMNS = 4, 3
# Points whose differences are taken side by side, so that the reference is widened once for all of them.
_GROUP = 4
# How far ahead the combination asks for cache lines, in elements: processors do not do it by themselves for more than a
# dozen streams.
_AHEAD = 128
_LINE_BYTES = 64

_GRAM_ARGUMENTS = ("ptr", "ptr", "i64", "ptr", "ptr", "ptr")
_COMBINE_ARGUMENTS = ("ptr", "ptr", "i64", "i64", "double", "ptr", "ptr", "ptr", "ptr")


@dataclass(frozen=True, slots=True)
class _Tile:
    """Products of neighbouring rows with neighbouring columns; without columns, of rows with each other.

    Attributes:
        first_row: Where its rows begin.
        rows: How many.
        first_column: Where its columns begin.
        columns: How many.
    """

    first_row: int
    rows: int
    first_column: int
    columns: int

    @property
    def name(self) -> str:
        """The function that computes tiles of this shape."""
        return f"products{self.rows}x{self.columns}" if self.columns else f"triangle{self.rows}"

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """The row and column of each product, counted from the tile's first ones."""
        if self.columns:
            return [(row, column) for row in range(self.rows) for column in range(self.columns)]
        return [(row, column) for row in range(self.rows) for column in range(row, self.rows)]


@compiled_once
def gram_loop(element: Element, count: int) -> tuple[Callable[..., None], np.ndarray, np.ndarray]:
    """Return the loop that adds up products of differences, and by sum (Q,) its row and its column.

    Its arguments are the addresses of N points, that of the reference, how many elements (a multiple of `BLOCK`), and
    memory for differences (N, K), sums (Q, L) and counts of equal elements (N, L).

    Args:
        element: The points' dtype.
        count: N, at least 1.
    """
    loop = Function("gram", _GRAM_ARGUMENTS)
    addresses, reference, elements, differences, sums, counts = loop.arguments
    texts: dict[str, str] = {}
    pairs: list[tuple[int, int]] = []
    with loop.loop(elements, BLOCK) as start:
        point = 0
        for group in _split(count, _GROUP):
            name = f"differences{group}"
            if name not in texts:
                texts[name] = _differences(name, element, group)
            source, target = loop.at(addresses, point, "ptr"), loop.at(differences, point * BLOCK, "double")
            loop.call(name, source, reference, start, target, loop.at(counts, point, DOUBLES))
            point += group
        for tile in _tiles(count):
            if tile.name not in texts:
                texts[tile.name] = _products(tile)
            left, right = (
                loop.at(differences, first * BLOCK, "double") for first in (tile.first_row, tile.first_column)
            )
            loop.call(tile.name, left, right, loop.at(sums, len(pairs), DOUBLES))
            pairs += [(tile.first_row + row, tile.first_column + column) for row, column in tile.pairs]
    first_Q, second_Q = np.array(pairs, dtype=np.int64).T
    return compiled_function([*texts.values(), loop.text()], "gram", _GRAM_ARGUMENTS), first_Q, second_Q


def _tiles(count: int) -> list[_Tile]:
    """Return tiles that cover the upper triangle, diagonal included."""
    tiles, row = [], 0
    for rows in _split(count, _ROWS):
        tiles.append(_Tile(row, rows, row, 0))
        column = row + rows
        for columns in _split(count - column, _COLUMNS):
            tiles.append(_Tile(row, rows, column, columns))
            column += columns
        row += rows
    return tiles


def _split(count: int, most: int) -> list[int]:
    """Return sizes of like parts, none above `most`: small ones would leave registers idle."""
    parts = -(-count // most)
    return [count // parts + (part < count % parts) for part in range(parts)]


def _differences(name: str, element: Element, group: int) -> str:
    """Return a function that writes a block's differences from the reference for a few points, and counts zeros."""
    function = Function(name, ("ptr", "ptr", "i64", "ptr", "ptr"), local=True)
    addresses, reference, start, differences, counts = function.arguments
    sources = [function.load("ptr", function.at(addresses, point, "ptr"), align=8) for point in range(group)]
    sources = [function.at(source, start, element.type) for source in sources]
    reference = function.at(reference, start, element.type)
    equal = [Variable(function, function.constant(INTS, 0)) for _ in sources]
    with function.loop(BLOCK, STRIP) as strip:
        for step in range(0, STRIP, LANES):
            subtracted, subtracted_wide = loaded(function, element, _moved(function, reference, strip, step, element))
            for point, source in enumerate(sources):
                address = _moved(function, source, strip, step, element)
                if step * element.nbytes % _LINE_BYTES == 0:
                    function.prefetch(function.at(address, BLOCK, element.type))
                value, wide = loaded(function, element, address)
                target = function.at(function.at(differences, strip, "double"), point * BLOCK + step, "double")
                function.store(wide - subtracted_wide, target)
                # True is -1.
                same = value.compared("oeq", subtracted).to("sext", INTS)
                equal[point].value = equal[point].value - same
    for point, variable in enumerate(equal):
        function.add_to(function.at(counts, point, DOUBLES), variable.value.to("uitofp", DOUBLES))
    return function.text()


def _moved(function: Function, address: Value, strip: Value, step: int, element: Element) -> Value:
    """Return the address of an element of a strip."""
    return function.at(function.at(address, strip, element.type), step, element.type)


def _products(tile: _Tile) -> str:
    """Return a function that adds the products of a block's rows and columns to their sums.

    The lanes are taken in as many rounds as it needs for all sums to stay in registers; each lane's sum is the same.
    """
    function = Function(tile.name, ("ptr", "ptr", "ptr"), local=True)
    left, right, sums = function.arguments
    lanes = _lanes_a_round(len(tile.pairs))
    doubles = f"<{lanes} x double>"
    with function.loop(LANES, lanes) if lanes < LANES else nullcontext(function.constant("i64", 0)) as lane:
        totals = [Variable(function, function.constant(doubles, 0)) for _ in tile.pairs]
        left, right = function.at(left, lane, "double"), function.at(right, lane, "double")
        with function.loop(BLOCK, LANES) as k:
            left_k, right_k = function.at(left, k, "double"), function.at(right, k, "double")
            held = [
                function.load(doubles, function.at(right_k, column * BLOCK, "double"), align=lanes * 8)
                for column in range(tile.columns or tile.rows)
            ]
            for row in range(tile.rows):
                place = function.at(left_k, row * BLOCK, "double")
                passing = function.load(doubles, place, align=lanes * 8) if tile.columns else held[row]
                for number, (at_row, column) in enumerate(tile.pairs):
                    if at_row == row:
                        totals[number].value = passing.times_plus(held[column], totals[number].value)
        for number, total in enumerate(totals):
            place = function.at(function.at(sums, lane, "double"), number * LANES, "double")
            function.add_to(place, total.value, align=lanes * 8)
    return function.text()


def _lanes_a_round(sums: int) -> int:
    """Return how many lanes at a time so many sums take: all of a register's, and more where they leave half free."""
    machine = processor()
    lanes = machine.doubles
    while lanes < LANES and sums * (2 * lanes // machine.doubles) <= machine.registers // 2:
        lanes *= 2
    return lanes


@compiled_once
def combine_loop(element: Element, output: Element) -> Callable[..., None]:
    """Return the loop that combines points and measures how far from them the rounded values lie.

    Its arguments are the addresses and factors of P points, the anchor first, P (at least 2), how many elements (a
    multiple of `BLOCK`), the anchor's own factor, where the values go, and memory for a block's sums (P, L), zero, the
    sums (P + 1, L), whose last row is the rounding's, and differences (P, STRIP).

    Args:
        element: The points' dtype.
        output: The values'.
    """
    function = Function("combine", _COMBINE_ARGUMENTS)
    _, _, points, elements, _, _, block_sums, sums, _ = function.arguments
    others = function.write(f"sub i64 {points.name}, 1", "i64")
    with function.loop(elements, BLOCK) as start:
        rounding, anchored = (Variable(function, function.constant(DOUBLES, 0)) for _ in range(2))
        with function.loop(BLOCK, STRIP) as k:
            _strip(function, element, output, start + k, others, rounding, anchored)
        with function.loop(others) as point:
            block_sum = function.at(block_sums, point, DOUBLES)
            function.add_to(
                function.at(function.at(sums, point, DOUBLES), 1, DOUBLES), function.load(DOUBLES, block_sum)
            )
            function.store(function.constant(DOUBLES, 0), block_sum)
        function.add_to(sums, anchored.value)
        function.add_to(function.at(sums, points, DOUBLES), rounding.value)
    return compiled_function([function.text()], "combine", _COMBINE_ARGUMENTS)


def _strip(
    function: Function,
    element: Element,
    output: Element,
    start: Value,
    others: Value,
    rounding: Variable,
    anchored: Variable,
) -> None:
    """Write the combination of one strip: differences from the anchor and their sum, rounding, distances."""
    addresses, factors, _, _, anchor_factor, values, block_sums, _, strips = function.arguments
    steps = range(0, STRIP, LANES)
    first = function.at(function.load("ptr", addresses, align=8), start, element.type)
    anchor = [_ahead(function, element, first, step) for step in steps]
    shift = [Variable(function, function.constant(DOUBLES, 0)) for _ in steps]
    with function.loop(others) as point:
        source = function.load("ptr", function.at(function.at(addresses, point, "ptr"), 1, "ptr"), align=8)
        source = function.at(source, start, element.type)
        factor = function.load("double", function.at(function.at(factors, point, "double"), 1, "double"), align=8)
        factor = function.splat(factor)
        row = function.at(strips, point, f"[{STRIP} x double]")
        for step, origin, total in zip(steps, anchor, shift, strict=True):
            difference = _ahead(function, element, source, step) - origin
            function.store(difference, function.at(row, step, "double"))
            total.value = factor.times_plus(difference, total.value)
    target, anchor_factor = function.at(values, start, output.type), function.splat(anchor_factor)
    offsets = []
    for step, origin, total in zip(steps, anchor, shift, strict=True):
        scaled, moved = anchor_factor * origin, total.value
        # A shift of zero must not turn -0.0 into 0.0.
        unmoved = moved.compared("oeq", function.constant(DOUBLES, 0))
        exact = function.select(unmoved, scaled, scaled + moved)
        stored, written = rounded(function, output, exact)
        function.store(stored, function.at(target, step, output.type), align=output.nbytes)
        error, offset = written - exact, written - origin
        rounding.value = error.times_plus(error, rounding.value)
        anchored.value = offset.times_plus(offset, anchored.value)
        offsets.append(offset)
    with function.loop(others) as point:
        row, place = function.at(strips, point, f"[{STRIP} x double]"), function.at(block_sums, point, DOUBLES)
        block_sum = function.load(DOUBLES, place)
        for step, offset in zip(steps, offsets, strict=True):
            distance = offset - function.load(DOUBLES, function.at(row, step, "double"))
            block_sum = distance.times_plus(distance, block_sum)
        function.store(block_sum, place)


def _ahead(function: Function, element: Element, strip: Value, step: int) -> Value:
    """Return eight elements of a strip as float64, and ask for the cache line of a later strip."""
    address = function.at(strip, step, element.type)
    if step * element.nbytes % _LINE_BYTES == 0:
        function.prefetch(function.at(address, _AHEAD, element.type))
    return loaded(function, element, address)[1]
