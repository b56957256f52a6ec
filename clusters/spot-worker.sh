#!/usr/bin/env bash
# Runs a Ray worker node on an EC2 spot instance, and has it drained when the instance is about to be taken away: it takes
# no new file, finishes the one in hand and leaves.
#   spot-worker.sh ray start --address=HEAD:6379 …
set -uo pipefail

metadata=http://169.254.169.254/latest
# Seconds between two looks: the notice comes two minutes ahead.
look_s=${SPOT_LOOK_S:-5}
# Seconds that Ray gives the work in hand, of those two minutes.
export RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S=${RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S:-100}

# Whether the instance has been told that it will go.
noticed() {
  local token
  token=$(curl -sf -m 2 -X PUT "$metadata/api/token" -H 'X-aws-ec2-metadata-token-ttl-seconds: 60') || return 1
  curl -sf -m 2 -o /dev/null -H "X-aws-ec2-metadata-token: $token" "$metadata/meta-data/spot/instance-action"
}

# Before the start: a signal in between must not leave a node that nobody watches.
node='' leaving=''
trap 'leaving=yes; [[ -n $node ]] && kill -TERM "$node"' TERM INT
"$@" --block &
node=$!
[[ -n $leaving ]] && kill -TERM "$node"
while kill -0 "$node" 2> /dev/null; do
  if noticed; then
    echo "$(date -u +%FT%TZ) the instance will be taken away: draining"
    # Ray's own way to leave: SIGTERM marks the node as draining, and waits for the work in hand.
    kill -TERM "$node"
    break
  fi
  sleep "$look_s"
done
wait "$node"
status=$?
# A wait that a signal cut short says nothing of the node.
while kill -0 "$node" 2> /dev/null; do
  wait "$node"
  status=$?
done
exit "$status"
