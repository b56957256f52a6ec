#!/usr/bin/env bash
# Submits one geomerge command to a Ray cluster, follows it to its end, and submits it again where that helps.
#   submit.sh NAME merge s3://bucket/recipe.yaml s3://bucket/out --workers 8
# NAME makes it safe to start twice: the job NAME-1 (NAME-2 …) that is running is followed, not started a second time, and
# one that has succeeded is not run again. Ray never restarts a lost driver; the next attempt resumes from the output.
#
# Environment:
#   RAY_API_SERVER_ADDRESS  the cluster's dashboard, http://127.0.0.1:8265; RAY_AUTH_MODE and the token as for any ray command
#   GEOMERGE_ATTEMPTS=5     how often at most
#   GEOMERGE_PAUSE_S=30     seconds between two attempts
#   GEOMERGE_PATIENCE_S=600 seconds without an answer of the cluster before this gives up; the job is not stopped by that
#   GEOMERGE_COMMAND        how geomerge is called there (geomerge)
#   GEOMERGE_RUNTIME_ENV    a runtime environment's file; without it the nodes have geomerge
# Exit code: geomerge's own; 143 for a job that somebody stopped; 6 for a driver or cluster that is lost.
set -uo pipefail

attempts=${GEOMERGE_ATTEMPTS:-5}
pause_s=${GEOMERGE_PAUSE_S:-30}
patience_s=${GEOMERGE_PATIENCE_S:-600}
# Seconds between two questions to a job that is not done.
look_s=${GEOMERGE_LOOK_S:-5}
plain=(--log-style pretty --log-color false)
read -ra command <<< "${GEOMERGE_COMMAND:-geomerge}"
state='' code='' id=''

say() { printf '%s submit.sh: %s\n' "$(date -u +%FT%TZ)" "$*" >&2; }

# The job outlives this script: whoever wants it ended says so to Ray.
leave() {
  local running
  running=$(jobs -p)
  # Unquoted: there may be several.
  [[ -n $running ]] && kill $running 2> /dev/null
  say "left; ${id:-nothing} goes on: the same command follows it, ray job stop ends it"
  exit 130
}

# Runs a command so that a signal to this script is heard at once.
attend() {
  "$@" &
  wait $!
}

# Sets `state` to what the cluster says of job $1, and `code` to its exit code, empty where it has none. The exit codes of
# ray's own commands do not tell: 0 for a job that was stopped, 1 for any failure. Only lines before the job's log count,
# for the log may say anything.
look() {
  local text line
  code=''
  if ! text=$(ray job status "${plain[@]}" "$1" 2>&1); then
    state=UNREACHABLE
    [[ $text == *"Job $1 does not exist"* ]] && state=ABSENT
    return
  fi
  state=UNREACHABLE
  while IFS= read -r line; do
    case $line in
      "Job '$1' succeeded") state=SUCCEEDED code=0 ;;
      "Job '$1' was stopped") state=STOPPED code=143 ;;
      "Job '$1' failed") state=FAILED ;;
      "Status for job '$1': "*) state=RUNNING ;;
      'Status message: '*)
        [[ $state == FAILED && $line =~ failed\ with\ exit\ code\ (-?[0-9]+) ]] && code=${BASH_REMATCH[1]}
        [[ $state == FAILED && $line == 'Status message: runtime_env setup failed'* ]] && code=1
        return
        ;;
    esac
    [[ $state == SUCCEEDED || $state == STOPPED ]] && return
  done <<< "$text"
}

# Waits for the end of job $1, showing its log. A job that the cluster has forgotten is lost with the head's memory of it.
follow() {
  local silent_since=$SECONDS
  while true; do
    look "$1"
    case $state in
      RUNNING)
        silent_since=$SECONDS
        # It ends with the job, or with the connection.
        attend ray job logs "${plain[@]}" --follow "$1"
        ;;
      UNREACHABLE)
        if ((SECONDS - silent_since >= patience_s)); then
          say "no answer of the cluster for $patience_s s; $1 may go on: the same command follows it"
          exit 6
        fi
        ;;
      *) return ;;
    esac
    attend sleep "$look_s"
  done
}

# Whether another attempt may end better than this one did, by geomerge's exit codes: storage (5), a lost worker or Ray (6)
# and a driver that was killed (none, or a signal). A wrong recipe (2), model (3), budget (4), result (7, 8) or output (9),
# a fault in the program (1), and somebody's ctrl-C (130) stay what they are.
worth_another() {
  [[ -z $1 || $1 == 5 || $1 == 6 ]] || ((($1 > 128 && $1 != 130) || $1 < 0))
}

if (($# < 2)) || [[ ! $1 =~ ^[A-Za-z0-9][A-Za-z0-9._-]*$ ]]; then
  sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0" >&2
  exit 2
fi
name=$1
shift
trap leave INT TERM

# What earlier calls have left: their last attempt is followed, and is the first of this call if it failed.
number=0
while true; do
  id=$name-$((number + 1))
  follow "$id"
  [[ $state == ABSENT ]] && break
  ((number += 1))
  [[ $state == SUCCEEDED ]] && { say "$id has succeeded; another NAME runs it again" && exit 0; }
  say "$id of an earlier call ended: $state${code:+, exit code $code}"
done

for ((attempt = 1; attempt <= attempts; attempt++)); do
  id=$name-$((number + attempt))
  say "attempt $attempt of $attempts: $id"
  refused=''
  if ! answer=$(ray job submit "${plain[@]}" --no-wait --submission-id "$id" \
    ${GEOMERGE_RUNTIME_ENV:+--runtime-env "$GEOMERGE_RUNTIME_ENV"} -- "${command[@]}" "$@" 2>&1); then
    printf '%s\n' "$answer" >&2
    [[ $answer == *'Failed to connect'* ]] || refused=yes
  fi
  follow "$id"
  # Not there although the cluster was asked: it has refused the job, unless the question did not arrive, or it has lost
  # its head since.
  if [[ $state == ABSENT && -n $refused ]]; then
    say "the cluster did not take $id"
    exit 1
  fi
  say "$id ended: $state${code:+, exit code $code}"
  [[ $state == SUCCEEDED || $state == STOPPED ]] && exit "$code"
  worth_another "$code" || exit "$code"
  ((attempt < attempts)) && attend sleep "$pause_s"
done
say "no attempt of $attempts succeeded; what is done is kept, the same command goes on from it"
[[ $code == 5 ]] && exit 5
exit 6
