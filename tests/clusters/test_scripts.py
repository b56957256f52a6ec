"""submit.sh decides by the truth about a job, and spot-worker.sh drains its node.

`ray` and `curl` are stand-ins on the PATH that say what the real ones say, in the words that Ray 2.60 was seen to use.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

CLUSTERS = Path(__file__).parents[2] / "clusters"

# `ray job …`: every submitted job takes the next word of the file `ends`: an exit code of geomerge, or what else became
# of it. A job is a file in jobs/ that holds its word. Every call is written to `calls`.
RAY = """#!/usr/bin/env bash
cd "$FAKE_RAY" || exit 99
echo "$*" >> calls
verb=$2
shift 2
id='' follow=''
while (($#)); do
  case $1 in
    --submission-id) id=$2; shift 2 ;;
    --log-style | --log-color | --runtime-env) shift 2 ;;
    --no-wait | --follow) shift ;;
    --) shift; break ;;
    *) id=$1; shift ;;
  esac
done
[[ -e unreachable ]] && { echo "ConnectionError: Failed to connect to Ray at address: http://x." >&2; exit 1; }
if [[ $verb == submit ]]; then
  [[ -e jobs/$id ]] && { echo "ValueError: Job with submission_id $id already exists." >&2; exit 1; }
  read -r end < ends
  sed -i 1d ends
  [[ $end == refused ]] && { echo "ValueError: the runtime_env is wrong" >&2; exit 1; }
  [[ $end == forgotten ]] || echo "$end" > "jobs/$id"
  echo "Job '$id' submitted successfully"
  exit 0
fi
[[ -e jobs/$id ]] || { echo "RuntimeError: Request failed with status code 404: Job $id does not exist." >&2; exit 1; }
end=$(< "jobs/$id")
if [[ $verb == logs ]]; then
  # Following ends with the job.
  [[ $end == running:* ]] && echo "${end#running:}" > "jobs/$id"
  echo "the log of $id"
  exit 0
fi
echo "Job submission server address: http://127.0.0.1:8265"
case $end in
  0) printf '\\n---\\n%s\\n---\\n' "Job '$id' succeeded" ;;
  stopped) echo "Job '$id' was stopped" ;;
  running:*) echo "Status for job '$id': RUNNING"; echo 'Status message: Job is currently running.' ;;
  supervisor) echo "Job '$id' failed"; echo 'Status message: Job supervisor actor died: the node is gone' ;;
  environment) echo "Job '$id' failed"; echo 'Status message: runtime_env setup failed: no such package' ;;
  *)
    printf '\\n---\\n%s\\n---\\n\\n' "Job '$id' failed"
    echo "Status message: Job entrypoint command failed with exit code $end, last available logs (truncated):"
    # A log may say anything.
    echo "Job '$id' succeeded"
    echo "Job entrypoint command failed with exit code 2"
    ;;
esac
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ray:
    """A stand-in for a cluster."""

    folder: Path

    def submit(self, *ends: str, name: str = "night", **settings: str) -> subprocess.CompletedProcess[str]:
        """Run submit.sh on a cluster where jobs end like this."""
        (self.folder / "ends").write_text("".join(f"{end}\n" for end in ends))
        return subprocess.run(self.command(name), env=self.environment(**settings), capture_output=True, text=True)

    def command(self, name: str = "night") -> list[str]:
        return [str(CLUSTERS / "submit.sh"), name, "merge", "s3://b/r.yaml", "s3://b/a name", "--workers", "8"]

    def environment(self, **settings: str) -> dict[str, str]:
        """Without pauses, unless a setting says otherwise."""
        quick = {"GEOMERGE_PAUSE_S": "0", "GEOMERGE_LOOK_S": "0", "GEOMERGE_PATIENCE_S": "1"}
        path = f"{self.folder}/bin:{os.environ['PATH']}"
        return {**os.environ, **quick, **settings, "PATH": path, "FAKE_RAY": str(self.folder)}

    @property
    def submitted(self) -> list[str]:
        """The identities of the jobs that were submitted, in order."""
        lines = (self.folder / "calls").read_text().splitlines()
        return [line.split("--submission-id ")[1].split()[0] for line in lines if line.startswith("job submit")]


def executable(path: Path, text: str) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


@pytest.fixture
def ray(tmp_path: Path) -> Ray:
    executable(tmp_path / "bin/ray", RAY)
    (tmp_path / "jobs").mkdir()
    (tmp_path / "calls").touch()
    return Ray(folder=tmp_path)


@pytest.mark.parametrize("name", ["submit.sh", "spot-worker.sh"])
def test_it_is_shell(name: str) -> None:
    done = subprocess.run(["bash", "-n", str(CLUSTERS / name)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert os.access(CLUSTERS / name, os.X_OK)


def test_a_job_that_succeeds_is_submitted_once_with_its_words_whole(ray: Ray) -> None:
    done = ray.submit("running:0", GEOMERGE_RUNTIME_ENV="env.yaml")
    assert done.returncode == 0, done.stderr
    (call,) = [line for line in (ray.folder / "calls").read_text().splitlines() if line.startswith("job submit")]
    assert "--submission-id night-1 --runtime-env env.yaml -- geomerge merge s3://b/r.yaml s3://b/a name" in call
    assert "the log of night-1" in done.stdout


def test_the_command_may_be_several_words(ray: Ray) -> None:
    assert ray.submit("0", GEOMERGE_COMMAND="python -m pipeline").returncode == 0
    assert "-- python -m pipeline merge s3://b/r.yaml" in (ray.folder / "calls").read_text()


@pytest.mark.parametrize("code", ["1", "2", "3", "4", "7", "8", "9", "130"])
def test_wrong_input_is_not_tried_again(ray: Ray, code: str) -> None:
    assert ray.submit(code, "0").returncode == int(code)
    assert ray.submitted == ["night-1"]


@pytest.mark.parametrize("end", ["5", "6", "137", "-9", "143", "-15", "139", "supervisor", "forgotten"])
def test_what_may_end_better_is_tried_again(ray: Ray, end: str) -> None:
    done = ray.submit(f"running:{end}" if end != "forgotten" else end, end, "running:0")
    assert done.returncode == 0, done.stderr
    assert ray.submitted == ["night-1", "night-2", "night-3"]


@pytest.mark.parametrize(("end", "code"), [("5", 5), ("6", 6), ("137", 6), ("supervisor", 6)])
def test_attempts_are_bounded(ray: Ray, end: str, code: int) -> None:
    done = ray.submit(*[end] * 9, GEOMERGE_ATTEMPTS="3")
    assert done.returncode == code
    assert ray.submitted == ["night-1", "night-2", "night-3"]
    assert "no attempt of 3 succeeded" in done.stderr


def test_wrong_input_after_a_lost_driver_ends_it(ray: Ray) -> None:
    assert ray.submit("137", "3", "0").returncode == 3
    assert ray.submitted == ["night-1", "night-2"]


def test_a_job_that_somebody_stopped_stays_stopped(ray: Ray) -> None:
    """Ray's own command ends with 0 for it."""
    assert ray.submit("running:stopped", "0").returncode == 143
    assert ray.submitted == ["night-1"]


@pytest.mark.parametrize("end", ["refused", "environment"])
def test_a_job_that_cannot_start_is_not_tried_again(ray: Ray, end: str) -> None:
    assert ray.submit(end, "0").returncode == 1
    assert ray.submitted == ["night-1"]


def test_a_running_job_is_followed_and_not_started_twice(ray: Ray) -> None:
    (ray.folder / "jobs/night-1").write_text("137\n")
    (ray.folder / "jobs/night-2").write_text("running:0\n")
    assert ray.submit("7").returncode == 0
    assert ray.submitted == []


def test_what_has_succeeded_is_not_run_again(ray: Ray) -> None:
    (ray.folder / "jobs/night-1").write_text("0\n")
    done = ray.submit("7")
    assert done.returncode == 0
    assert "another NAME" in done.stderr
    assert ray.submitted == []
    assert ray.submit("0", name="night.2").returncode == 0
    assert ray.submitted == ["night.2-1"]


def test_after_a_failure_the_same_command_goes_on(ray: Ray) -> None:
    (ray.folder / "jobs/night-1").write_text("2\n")
    assert ray.submit("0").returncode == 0
    assert ray.submitted == ["night-2"]


def test_a_cluster_that_does_not_answer_is_given_up(ray: Ray) -> None:
    (ray.folder / "unreachable").touch()
    done = ray.submit("0")
    assert done.returncode == 6
    assert "no answer of the cluster for 1 s" in done.stderr
    assert ray.submitted == []


def test_a_cluster_that_answers_again_is_waited_for(ray: Ray) -> None:
    (ray.folder / "jobs/night-1").write_text("0\n")
    (ray.folder / "unreachable").touch()
    environment = ray.environment(GEOMERGE_PATIENCE_S="60", GEOMERGE_LOOK_S="0.1")
    process = subprocess.Popen(ray.command(), env=environment, stderr=subprocess.DEVNULL)
    time.sleep(0.5)
    assert process.poll() is None
    (ray.folder / "unreachable").unlink()
    assert process.wait(timeout=60) == 0


def test_a_signal_leaves_the_job_alone(ray: Ray) -> None:
    (ray.folder / "jobs/night-1").write_text("running:running:running:0\n")
    environment = ray.environment(GEOMERGE_LOOK_S="60")
    process = subprocess.Popen(
        ray.command(), env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert "the log of night-1" in process.stdout.readline()
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "night-1 goes on" in said
    assert not [line for line in (ray.folder / "calls").read_text().splitlines() if line.startswith("job stop")]


@pytest.mark.parametrize("words", [[], ["night"], ["a night", "merge"], ["-n", "merge"], ["night;ls", "merge"]])
def test_a_wrong_call_says_how(ray: Ray, words: list[str]) -> None:
    done = subprocess.run([str(CLUSTERS / "submit.sh"), *words], env=ray.environment(), capture_output=True, text=True)
    assert done.returncode == 2
    assert "submit.sh NAME merge" in done.stderr
    assert ray.submitted == []


# Instance metadata of EC2: a token, then 404 until `notice` is there.
CURL = """#!/usr/bin/env bash
case "$*" in
  *api/token*) [[ "$*" == *"-X PUT"* ]] && echo token ;;
  *"X-aws-ec2-metadata-token: token"*spot/instance-action) [[ -e $FAKE_RAY/notice ]] || exit 22 ;;
  *) exit 99 ;;
esac
"""
# `ray start --block`: goes after its drain, with exit code 1 as the real one.
NODE = """#!/usr/bin/env bash
[[ $* == "start --address=head:6379 --block" ]] || exit 98
trap 'echo "drained within $RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S s"; exit 1' TERM
echo up
for _ in $(seq 600); do sleep 0.1 & wait $!; [[ -e $FAKE_RAY/dead ]] && exit 7; done
"""


@pytest.fixture
def node(tmp_path: Path) -> Path:
    executable(tmp_path / "bin/ray", NODE)
    executable(tmp_path / "bin/curl", CURL)
    return tmp_path


def start(folder: Path) -> subprocess.Popen[str]:
    """Start spot-worker.sh and wait for its node."""
    path = f"{folder}/bin:{os.environ['PATH']}"
    process = subprocess.Popen(
        [str(CLUSTERS / "spot-worker.sh"), "ray", "start", "--address=head:6379"],
        env={**os.environ, "PATH": path, "FAKE_RAY": str(folder), "SPOT_LOOK_S": "0.1"},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n"
    return process


def test_a_node_that_will_be_taken_away_is_drained(node: Path) -> None:
    process = start(node)
    time.sleep(0.5)
    assert process.poll() is None
    (node / "notice").touch()
    said, _ = process.communicate(timeout=30)
    assert process.returncode == 1
    assert "the instance will be taken away" in said
    assert "drained within 100 s" in said


def test_a_signal_drains_too(node: Path) -> None:
    process = start(node)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=30)
    assert process.returncode == 1
    assert "drained within 100 s" in said


def test_the_end_of_the_node_is_the_end_of_the_script(node: Path) -> None:
    process = start(node)
    (node / "dead").touch()
    process.communicate(timeout=30)
    assert process.returncode == 7
