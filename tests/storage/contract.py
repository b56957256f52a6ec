"""What every store must do; each implementation's test class inherits it and says how to make one."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.errors import StorageError
from pipeline.storage import Leftover, MissingObject, Store, counters, open_store

MEGABYTE = bytes(range(256)) * 4096


class StoreContract:
    @pytest.fixture
    def make_store(self) -> Callable[[], Store]:
        """Return a function that opens the same, at first empty, place each time."""
        raise LookupError("the subclass must override this fixture")

    @pytest.fixture
    def store(self, make_store: Callable[[], Store]) -> Store:
        return make_store()

    def test_round_trip_and_replacement(self, store: Store) -> None:
        for data in (b"", b"first", MEGABYTE, b"x"):
            store.write("folder/sub/name.bin", data)
            assert store.read("folder/sub/name.bin") == data
            assert store.stat("folder/sub/name.bin").size_bytes == len(data)

    def test_another_store_of_the_same_url_sees_what_was_written(
        self, store: Store, make_store: Callable[[], Store]
    ) -> None:
        store.write("a", b"1")
        assert make_store().read("a") == b"1"

    def test_version_changes_with_replacement_and_only_then(self, store: Store) -> None:
        store.write("a", b"1111")
        first = store.stat("a").version
        assert store.stat("a").version == first
        store.write("a", b"2222")
        assert store.stat("a").version != first

    @settings(
        max_examples=30,
        deadline=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.differing_executors],
    )
    @given(bounds=st.tuples(st.integers(0, 1000), st.integers(0, 1000)))
    def test_any_range_is_that_slice(self, store: Store, bounds: tuple[int, int]) -> None:
        data = MEGABYTE[:1000]
        if not store.exists("ranges"):
            store.write("ranges", data)
        start, stop = sorted(bounds)
        assert store.read("ranges", start, stop) == data[start:stop]
        assert store.read("ranges", start) == data[start:]
        buffer = bytearray(stop - start)
        store.read_into("ranges", start, memoryview(buffer))
        assert bytes(buffer) == data[start:stop]

    def test_read_into_fills_a_view_of_wider_elements(self, store: Store) -> None:
        store.write("a", bytes(range(64)))
        buffer = memoryview(bytearray(32)).cast("d")
        store.read_into("a", 16, buffer)
        assert buffer.tobytes() == bytes(range(16, 48))

    def test_read_into_leaves_the_rest_of_the_buffer(self, store: Store) -> None:
        store.write("a", b"abcdef")
        buffer = bytearray(b"........")
        store.read_into("a", 1, memoryview(buffer)[2:5])
        assert buffer == b"..bcd..."

    @pytest.mark.parametrize(("start", "stop", "got"), [(2, 9, 3), (5, 6, 0), (700, 800, 0)])
    def test_a_short_read_names_wanted_and_got(self, store: Store, start: int, stop: int, got: int) -> None:
        store.write("folder/a", b"12345")
        with pytest.raises(
            StorageError, match=rf"folder/a: wanted {stop - start} bytes from offset {start}, got {got} "
        ):
            store.read("folder/a", start, stop)
        with pytest.raises(
            StorageError, match=rf"folder/a: wanted {stop - start} bytes from offset {start}, got {got} "
        ):
            store.read_into("folder/a", start, memoryview(bytearray(stop - start)))

    def test_reading_from_beyond_the_end_is_an_error_at_the_end_it_is_empty(self, store: Store) -> None:
        store.write("a", b"12345")
        assert store.read("a", 5) == b""
        with pytest.raises(StorageError, match="from offset 6, got 0"):
            store.read("a", 6)

    def test_several_buffers_are_filled_one_behind_the_other(self, store: Store) -> None:
        store.write("a", MEGABYTE)
        buffers = [bytearray(size) for size in (3, 0, 70_000, 1)]
        store.read_into("a", 11, *map(memoryview, buffers))
        assert b"".join(buffers) == MEGABYTE[11 : 11 + 70_004]
        store.read_into("a", 11)
        with pytest.raises(StorageError, match="wanted"):
            store.read_into("a", len(MEGABYTE) - 3, memoryview(bytearray(2)), memoryview(bytearray(2)))

    @pytest.mark.parametrize(("start", "stop"), [(-1, 3), (3, 2)])
    def test_an_impossible_range_is_the_callers_mistake(self, store: Store, start: int, stop: int) -> None:
        with pytest.raises(ValueError, match="no byte range"):
            store.read("a", start, stop)

    def test_absent_objects(self, store: Store) -> None:
        for act in (
            lambda: store.stat("no/such"),
            lambda: store.read("no/such"),
            lambda: store.read("no/such", 0, 4),
            lambda: store.read("no/such", 0, 0),
            lambda: store.read_into("no/such", 0, memoryview(bytearray(4))),
        ):
            with pytest.raises(MissingObject, match="no/such: does not exist"):
                act()
        assert not store.exists("no/such")
        assert store.list("no") == ()
        store.delete("no/such")

    def test_a_folder_is_no_object(self, store: Store) -> None:
        store.write("folder/a", b"1")
        assert not store.exists("folder")
        with pytest.raises(MissingObject):
            store.stat("folder")
        with pytest.raises(StorageError):
            store.read("folder")

    def test_list_is_recursive_sorted_and_relative(self, store: Store) -> None:
        assert store.list() == ()
        paths = ("b", "a/z", "a/b/c", "a.txt", "ab/x", ".hidden/y", "name [1]*.bin", "ünïcode")
        for path in reversed(paths):
            store.write(path, b"1")
        assert store.list() == tuple(sorted(paths))
        assert store.list("a") == ("a/b/c", "a/z")
        assert store.list("a/") == ("a/b/c", "a/z")
        assert store.list("a.txt") == ()
        for path in paths:
            assert store.read(path) == b"1"

    def test_deleted_objects_are_gone(self, store: Store) -> None:
        store.write("a/b", b"1")
        store.write("a/c", b"1")
        store.delete("a/b")
        assert store.list() == ("a/c",)
        assert not store.exists("a/b")

    @pytest.mark.parametrize("path", ["", "/a", "a//b", "../a", "a/../b", ".", "a/./b", "a/", "a\0b", "a\\b"])
    def test_paths_stay_inside(self, store: Store, path: str) -> None:
        for act in (store.read, store.stat, store.exists, store.delete, store.open_writer):
            with pytest.raises(StorageError, match="is no path inside a store"):
                act(path)
        with pytest.raises(StorageError, match="is no path inside a store"):
            store.write(path, b"")

    def test_nothing_is_visible_before_commit(self, store: Store) -> None:
        writer = store.open_writer("folder/model")
        writer.write(b"first,")
        writer.write(memoryview(b"second"))
        writer.write(b"")
        assert not store.exists("folder/model")
        assert store.list() == ()
        writer.commit()
        assert store.read("folder/model") == b"first,second"
        writer.commit()
        writer.abort()
        assert store.list() == ("folder/model",)

    def test_the_old_object_stays_until_commit(self, store: Store) -> None:
        store.write("a", b"old")
        writer = store.open_writer("a")
        writer.write(b"new and longer")
        assert store.read("a") == b"old"
        writer.commit()
        assert store.read("a") == b"new and longer"

    def test_abort_leaves_nothing_and_forbids_the_rest(self, store: Store) -> None:
        store.write("a", b"old")
        writer = store.open_writer("a")
        writer.write(MEGABYTE)
        writer.abort()
        writer.abort()
        assert store.read("a") == b"old"
        assert store.list() == ("a",)
        with pytest.raises(StorageError, match="the writer is aborted"):
            writer.write(b"1")
        with pytest.raises(StorageError, match="the writer is aborted"):
            writer.commit()

    def test_a_failing_body_publishes_nothing(self, store: Store) -> None:
        def body() -> None:
            with store.open_writer("a") as writer:
                writer.write(b"half")
                raise KeyError

        with pytest.raises(KeyError):
            body()
        assert store.list() == ()

    def test_an_empty_object_can_be_streamed(self, store: Store) -> None:
        with store.open_writer("a") as writer:
            writer.commit()
        assert store.stat("a").size_bytes == 0

    def test_a_view_of_wider_elements_is_written_whole(self, store: Store) -> None:
        with store.open_writer("a") as writer:
            writer.write(memoryview(bytes(range(64))).cast("d", (2, 4)))
            writer.commit()
        assert store.read("a") == bytes(range(64))

    def test_threads_may_share_it(self, store: Store) -> None:
        def work(number: int) -> bool:
            path, data = f"t/{number % 5}", bytes([number % 5]) * 5000
            store.write(path, data)
            return store.read(path, 100, 4000) == data[100:4000] and path in store.list("t")

        with ThreadPoolExecutor(8) as pool:
            assert all(pool.map(work, range(60)))

    def test_create_puts_once(self, store: Store, make_store: Callable[[], Store]) -> None:
        assert store.create("folder/a", b"first") is True
        assert make_store().create("folder/a", b"second") is False
        assert store.read("folder/a") == b"first"
        store.delete("folder/a")
        assert store.create("folder/a", b"third") is True
        assert store.create("empty", b"") is True
        assert store.create("empty", b"") is False
        store.write("folder/a", b"replaced")
        assert store.read("folder/a") == b"replaced"
        assert store.list() == ("empty", "folder/a")
        assert store.leftovers() == ()

    def test_what_was_finished_leaves_nothing(self, store: Store) -> None:
        assert store.leftovers() == ()
        store.write("folder/a", MEGABYTE)
        for path in ("folder/b", "c"):
            with store.open_writer(path) as writer:
                writer.write(MEGABYTE)
                writer.commit()
        aborted = store.open_writer("folder/d")
        aborted.write(MEGABYTE)
        aborted.abort()
        assert store.leftovers() == ()
        assert store.sweep() == 0
        assert store.list() == ("c", "folder/a", "folder/b")

    def test_only_leftovers_can_be_removed_as_such(self, store: Store) -> None:
        store.write("a", b"1")
        with pytest.raises(ValueError, match="a is no leftover"):
            store.remove_leftover(Leftover(kind="temporary", path="a"))
        with pytest.raises(ValueError, match="a is no leftover"):
            store.remove_leftover(Leftover(kind="upload", path="a"))
        # One that is gone already.
        store.remove_leftover(Leftover(kind="temporary", path=".a.1-0123456789abcdef.part"))
        assert store.list() == ("a",)

    def test_what_moves_is_counted(self, store: Store) -> None:
        before = counters()
        store.write("a", MEGABYTE)
        with store.open_writer("b") as writer:
            writer.write(MEGABYTE)
            writer.commit()
        written = counters()
        assert written.written_bytes - before.written_bytes == 2 * len(MEGABYTE)
        assert written.read_bytes == before.read_bytes
        assert written.requests >= before.requests + 2
        store.read("a", 10, 110)
        store.read_into("b", 0, memoryview(bytearray(1000)))
        assert store.create("a", b"12345") is False
        assert store.create("c", b"12345") is True
        after = counters()
        assert after.read_bytes - written.read_bytes == 1100
        assert after.written_bytes - written.written_bytes >= 5
        assert after.requests >= written.requests + 4
        assert after.retries == before.retries

    def test_probe_leaves_no_trace(self, store: Store) -> None:
        store.probe_writable()
        assert store.list() == ()

    def test_close_can_be_repeated_and_the_store_used_again(self, store: Store) -> None:
        store.write("a", b"1")
        assert store.read("a") == b"1"
        store.close()
        store.close()
        assert store.read("a") == b"1"

    def test_url_and_location(self, store: Store) -> None:
        assert not store.url.endswith("/")
        assert store.location() == store.url
        assert store.location("a/b") == f"{store.url}/a/b"
        assert store.is_local == ("://" not in store.url)
        assert open_store(store.url).url == store.url


class ExclusiveContract:
    """What a store must do whose `create` is exclusive among processes; beside `StoreContract`."""

    def test_of_many_creators_one_succeeds(self, make_store: Callable[[], Store]) -> None:
        for round_number in range(5):
            begin = threading.Barrier(8)

            def race(number: int, begin: threading.Barrier = begin, path: str = f"claims/{round_number}") -> bool:
                # Some with bytes of their own, some with equal ones: the bytes must not decide.
                store, data = make_store(), b"%d" % (number // 2)
                begin.wait()
                return store.create(path, data)

            with ThreadPoolExecutor(8) as pool:
                won = list(pool.map(race, range(8)))
            assert sum(won) == 1
            assert make_store().read(f"claims/{round_number}") == b"%d" % (won.index(True) // 2)
        assert make_store().leftovers() == ()
