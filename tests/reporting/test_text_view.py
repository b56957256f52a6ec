"""What the commands print for people."""

from typing import Any

import pytest
from rich.console import Console
from rich.table import Table

from pipeline.reporting.batch_view import batch_view
from pipeline.reporting.text_view import cleaned_view, plan_view, report_view, status_view

STATUS: dict[str, Any] = {
    "output": "/out", "state": "measuring", "method": "linear", "fingerprint": "f", "files": 8, "files_measured": 2,
    "files_written": 0, "bytes": 10_000_000, "bytes_written": 0, "error": None,
    "run": {"host": "node1", "pid": 12, "started": "2031-05-04T01:00:00Z", "alive": True},
    "last_sign_of_life": "2031-05-04T01:10:00Z", "phase": "measure", "iteration": None, "done_bytes": 2_500_000,
    "total_bytes": 30_000_000, "files_done": 2, "files_total": 8, "rate": 500_000.0, "seconds_left": 55.0,
    "waiting_for": "",
}  # fmt: skip
NO_RUN = {
    **STATUS, "state": "committed", "files_written": 8, "bytes_written": 10_000_000, "run": None,
    **dict.fromkeys(("last_sign_of_life", "phase", "iteration", "done_bytes", "total_bytes", "files_done",
                     "files_total", "rate", "seconds_left", "waiting_for")),
}  # fmt: skip
WHO = "  process 12 on node1, since 2031-05-04T01:00:00Z, last sign of life 2031-05-04T01:10:00Z"
COUNTS = "/out: measuring; 2 measured and 0 written of 8 files, 0 B of 10 MB"


def printed(parts: list[str | Table], width: int = 200) -> str:
    console = Console(width=width, no_color=True)
    with console.capture() as capture:
        for part in parts:
            console.print(part, markup=False) if isinstance(part, str) else console.print(part)
    return capture.get()


def test_a_run_that_lives_tells_its_pace() -> None:
    assert list(status_view(STATUS)) == [
        COUNTS, "  at the last sign of life measure: 2.5 MB of 30 MB, 500 KB/s, 55 s left", WHO
    ]  # fmt: skip


def test_a_run_tells_what_it_waits_for_and_its_iteration() -> None:
    waiting = "worker 2 on 10.0.0.3: no sign of life for 35 s; started again"
    found = {**STATUS, "phase": "solve", "iteration": 12, "rate": None, "seconds_left": None, "waiting_for": waiting}
    assert list(status_view(found))[1:3] == [
        "  at the last sign of life solve, iteration 12: 2.5 MB of 30 MB, 2 of 8 files", f"  waits for {waiting}"
    ]  # fmt: skip


def test_a_run_between_passes_has_no_numbers() -> None:
    found = {**STATUS, "phase": "start", **dict.fromkeys(("rate", "seconds_left"))}
    assert list(status_view({**found, "total_bytes": 0, "files_total": 0}))[1] == "  at the last sign of life start"


@pytest.mark.parametrize(
    ("state", "error"), [("interrupted", None), ("interrupted", "SystemExit: 143"), ("failed", "storage: no room")]
)
def test_a_run_that_ended_says_why_and_how_to_go_on(state: str, error: str | None) -> None:
    gone = {**STATUS["run"], "alive": False}
    found = {**STATUS, "state": state, "error": error, "run": gone, **dict.fromkeys(("rate", "seconds_left"))}
    wanted = [COUNTS.replace("measuring", state), *([f"  ended by: {error}"] if state == "failed" else []), WHO]
    assert list(status_view(found)) == [*wanted, "  the same command resumes"]


def test_an_error_that_asks_for_overwrite_is_not_followed_by_another_remedy() -> None:
    gone = {**STATUS["run"], "alive": False}
    found = {**STATUS, "state": "failed", "error": "model m: changed (start again with --overwrite)", "run": gone}
    assert list(status_view(found))[-1] == WHO
    assert list(status_view({**found, "error": None}))[-1] == "  the same command resumes"


def test_a_finished_merge_is_one_line() -> None:
    assert list(status_view(NO_RUN)) == ["/out: committed; 2 measured and 8 written of 8 files, 10 MB of 10 MB"]


def test_a_damaged_merge_says_how_to_mend_it() -> None:
    assert list(status_view({**NO_RUN, "state": "damaged"}))[1:] == ["  the same command writes what is gone"]
    lost = {**NO_RUN, "state": "damaged", "fingerprint": None}
    assert list(status_view(lost))[1:] == ["  the plan cannot be read; --overwrite starts again"]


def test_names_are_printed_as_they_are() -> None:
    """Square brackets would be markup for rich."""
    group = {"coefficients": [1.0], "norms": None, "relative_gap": None, "scale": 1.0}
    report = {
        "method": "linear", "groups": [group], "models": [{"model": "models/[bold]x[/bold]"}], "weights": [1.0],
        "rank": None, "resumed_files": 0, "bytes_written": 1, "files": [{}], "passes": 1.0, "seconds": {"write": 1.0},
    }  # fmt: skip
    text = printed(list(report_view(report, "out")))
    assert "models/[bold]x[/bold]" in text
    # True of a merge that was found finished, too.
    assert text.endswith("out: 1 group, 1 file, 1 B; the run that committed it took 1 pass over the inputs, 1 s\n")


def test_the_files_of_a_plan_are_counted_and_their_sizes_bounded() -> None:
    plan = {
        "method": "linear", "models": ["a"], "scope": "model", "tensors": 1, "elements": 1, "chunks": 1, "notes": [],
        "groups": [{"name": "all"}], "bytes_to_read": 9, "bytes_to_write": 8_000_000, "passes": 1.0, "seconds": {},
        "memory_per_worker": {"total": 1, "terms": {}},
    }  # fmt: skip
    for sizes, words in (
        ([1_200_000, 5_000_000, 1_800_000], "in 3 files of 1.2 MB to 5 MB"),
        ([4_000_000, 4_000_000], "in 2 files of 4 MB"),
        ([8_000_000], "in 1 file of 8 MB"),
    ):
        files = [{"name": f"model-{number}", "bytes": size} for number, size in enumerate(sizes)]
        read = list(plan_view({**plan, "files": files}))[2]
        assert read == f"read     9 B in 1 pass; write 8 MB {words}"


def row(recipe: str, state: str, **facts: Any) -> dict[str, Any]:
    empty = {"error": "", "seconds": 0.0, "bytes_read": 0, "bytes_written": 0, "started": ""}
    return {"recipe": recipe, "state": state, **empty, **facts}


def test_a_batch_is_a_table_and_a_line() -> None:
    summary = {
        "outputs": "/out",
        "seconds": 75.0,
        "counts": {"committed": 1, "unchanged": 0, "failed": 1, "busy": 0, "stopped": 0, "not started": 1},
        "merges": [
            row("chat", "committed", seconds=62.0, bytes_read=3_000_000, bytes_written=1_000_000, started="t"),
            row("code", "failed", seconds=2.0, error="model [m]: has a NaN", started="t"),
            row("law", "not started"),
        ],
    }
    *_, last = lines = printed(list(batch_view(summary))).splitlines()
    assert last == "/out: 3 recipes, 1 committed, 1 failed, 1 not started, 1 min 15 s"
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines if line.startswith("│")]
    assert cells == [
        ["chat", "committed", "1 min 02 s", "3 MB", "1 MB"],
        ["code", "failed", "2 s", "", ""],
        ["law", "not started", "", "", ""],
    ]
    good = {**summary, "merges": summary["merges"][:1], "counts": {"committed": 1}}
    assert "1 recipe, 1 committed" in printed(list(batch_view(good)))


def test_leftovers_are_a_table_and_a_line() -> None:
    entry = {"path": "a/[x].safetensors", "kind": "upload", "bytes": None, "age_seconds": 7200.0, "done": "removed"}
    young = {"path": "b/.y.part", "kind": "temporary", "bytes": 12, "age_seconds": None, "done": "kept: too young"}
    result = {"url": "s3://b", "dry_run": False, "found": [entry, young], "removed": 1}
    text = printed(list(cleaned_view(result)))
    for words in ("a/[x].safetensors", "upload", "2 h 00 min", "12 B", "kept: too young"):
        assert words in text
    assert text.endswith("s3://b: 2 leftovers, 1 removed\n")
    nothing = list(cleaned_view({**result, "found": [], "removed": 0, "dry_run": True}))
    assert nothing == ["s3://b: 0 leftovers, 0 would be removed"]
