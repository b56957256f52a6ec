"""The chunk grid."""

from hypothesis import given
from hypothesis import strategies as st

from pipeline.planning.grid import (
    CHUNK_SET_ELEMENTS,
    MAX_CHUNK_ELEMENTS,
    MIN_CHUNK_ELEMENTS,
    chunk_elements,
    chunks_of,
)


def test_chunk_lengths_of_known_families_are_frozen() -> None:
    found = {inputs: chunk_elements(inputs) for inputs in (1, 9, 16, 17, 33, 100, 1000, 10**6)}
    assert found == {
        1: 1 << 20, 9: 1 << 20, 16: 1 << 20, 17: 1 << 19, 33: 1 << 18, 100: 1 << 17, 1000: 1 << 14, 10**6: 1 << 14
    }  # fmt: skip


@given(st.integers(1, 5000))
def test_a_length_is_a_power_of_two_within_its_share(inputs: int) -> None:
    length = chunk_elements(inputs)
    assert length & (length - 1) == 0
    assert MIN_CHUNK_ELEMENTS <= length <= MAX_CHUNK_ELEMENTS
    assert length * inputs <= CHUNK_SET_ELEMENTS or length == MIN_CHUNK_ELEMENTS
    assert chunk_elements(inputs + 1) <= length


@given(st.integers(0, 10_000), st.integers(1, 3000))
def test_chunks_cover_a_tensor_once_and_in_order(elements: int, length: int) -> None:
    chunks = chunks_of(7, elements, length)
    covered = [element for chunk in chunks for element in range(chunk.start, chunk.stop)]
    assert covered == list(range(elements))
    assert all(chunk.tensor == 7 and 0 < chunk.elements <= length for chunk in chunks)
    assert all(chunk.elements == length for chunk in chunks[:-1])
    assert all(chunk.start % length == 0 for chunk in chunks)
