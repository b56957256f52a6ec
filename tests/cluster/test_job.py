"""Merges submitted to a cluster as its users do, from and to a bucket: the bits of local ones, and no secrets."""

from __future__ import annotations

import json
import re
import urllib.request

from pipeline.storage import open_store
from tests.cluster.bucket import Bucket, bits, place_of, remains, stamps
from tests.cluster.driver import DriverProcess
from tests.cluster.gate import Gate, wait_until
from tests.support.cluster import Cluster
from tests.support.processes import command_line, kill
from tests.support.s3 import KEY, SECRET

WORKERS = "3"


def entrypoint(recipe: str, output: str) -> tuple[str, ...]:
    return ("python", "-m", "pipeline", "merge", recipe, output, "--workers", WORKERS)


def test_a_submitted_merge(cluster: Cluster, bucket: Bucket) -> None:
    recipe, output = bucket.order()
    done = cluster.submit("whole", *entrypoint(recipe, output))
    # Before they end: what an idle worker is called is of interest too.
    commands = [command_line(pid) for node in cluster.nodes.values() for pid in node.processes()]
    assert done.returncode == 0, done.stdout + done.stderr
    assert cluster.job_status("whole") == "SUCCEEDED"
    assert bits(output) == bucket.undisturbed("gram")
    store = open_store(output)
    report = json.loads(store.read("geomerge_report.json"))
    assert (report["executor"], report["workers"]) == ("ray", 3)
    assert {name.split()[0] for name in report["peak_memory_bytes"]} == {"driver", "worker"}
    status = cluster.run("geomerge", "status", output)
    assert status.returncode == 0, status.stderr
    assert "committed" in status.stdout

    listed = cluster.run("ray", "job", "list").stdout
    logged = json.dumps(cluster.ask("/api/jobs/whole/logs"))
    assert "whole" in listed
    assert "the run that committed it" in logged
    assert any("raylet" in command for command in commands)
    shown = [done.stdout, done.stderr, status.stdout, listed, logged, *commands]
    shown += [json.dumps(cluster.ask(path)) for path in ("/api/jobs/", "/api/v0/actors", "/api/v0/jobs")]
    shown += [store.read(path).decode(errors="replace") for path in store.list()]
    for secret in (KEY, SECRET, cluster.token):
        assert not [text[:200] for text in shown if secret in text]


def test_a_job_whose_driver_is_killed_is_submitted_again(cluster: Cluster, bucket: Bucket, gate: Gate) -> None:
    recipe, output = bucket.order(distances="stream", endpoint=gate.endpoint)
    command = entrypoint(recipe, output)
    with gate.hold(f"PUT {place_of(output)}/model-".encode(), after=2) as hold:
        assert (
            cluster.run("ray", "job", "submit", "--no-wait", "--submission-id", "killed", "--", *command).returncode
            == 0
        )
        hold.wait()
        drivers = [pid for pid in cluster.nodes[0].processes() if command_line(pid).endswith(" ".join(command[1:]))]
        assert drivers
        kill(*drivers)
        wait_until(lambda: not cluster.actors(), "its workers end with it")
    wait_until(lambda: cluster.job_status("killed") == "FAILED", "the job is known to have failed")
    left = remains(output)
    done = cluster.submit("again", *command)
    assert done.returncode == 0, done.stdout + done.stderr
    assert bits(output) == bucket.undisturbed("stream")
    assert left.stamps.items() <= stamps(output).items()
    report = json.loads(open_store(output).read("geomerge_report.json"))
    assert report["resumed_files"] == left.resumed
    # The solution was saved.
    assert report["iterations_over_parameters"] == 0


def test_a_merge_is_counted_at_its_node(cluster: Cluster, bucket: Bucket, driver: DriverProcess) -> None:
    recipe, output = bucket.order()
    driver.merge(recipe, output, workers=2)
    report = driver.finish()
    counted: dict[str, float] = {}

    def is_counted() -> bool:
        with urllib.request.urlopen(cluster.nodes[0].metrics_url, timeout=10) as reply:
            text = reply.read().decode()
        counted.clear()
        for name, value in re.findall(r"^ray_geomerge_(\w+?)(?:_total)?\{[^}]*\} (\S+)$", text, re.MULTILINE):
            counted[name] = counted.get(name, 0.0) + float(value)
        return counted.get("passes", 0) >= 2 and counted.get("written_bytes", 0) >= report["bytes_written"]

    # Ray takes them to the endpoint every ten seconds.
    wait_until(is_counted, f"counters at the endpoint: {counted}")
    assert counted["read_bytes"] >= report["bytes_read"]
    assert counted["requests"] > len(report["files"])


# Prints on how many nodes the workers of a job would start, and what is left of the groups.
SPREAD = """
import collections, json, ray, time
from ray.util.placement_group import placement_group_table
from pipeline.engine.executors.ray_nodes import Ask
from pipeline.engine.executors.ray_spread import places
ray.init("auto", logging_level="error")
ask = Ask(memory_bytes=1 << 20, gpus=0)
deadline = time.monotonic() + 100
while ray.available_resources().get("CPU", 0) < 4 and time.monotonic() < deadline:
    time.sleep(0.5)
found = {workers: sorted(collections.Counter(places(ask, workers)).values()) for workers in (1, 2, 3, 4, 5)}
left = sorted({group["state"] for group in placement_group_table().values()})
print(json.dumps({"found": found, "left": left}))
"""


def test_a_jobs_workers_start_evenly_on_the_nodes_that_have_room_for_all(
    cluster: Cluster, kept_driver: DriverProcess
) -> None:
    # Its workers would stay.
    kept_driver.kill()
    done = cluster.run("python", "-c", SPREAD)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout.splitlines()[-1])
    # Two nodes of two CPUs; the head has none.
    assert answer["found"] == {"1": [], "2": [1, 1], "3": [1, 2], "4": [2, 2], "5": []}
    assert answer["left"] == ["REMOVED"]
