#!/usr/bin/env bash
# Builds the image of docker/Dockerfile with buildah, in chroots, and serves from it: no container engine runs, and
# nothing of the kernel's that an engine needs, such as cgroups or a network of its own. For root on Debian or Ubuntu.
# Ends with 0 if requests are answered and SIGTERM ends the server with status 0.
#
#   BASE_IMAGE     an image that buildah has; if it is not given, debootstrap makes one of Ubuntu 22.04
#   BUILD_OPTIONS  further options of buildah's build, such as --secret id=pip_conf,src=/etc/pip.conf
set -euo pipefail
unset CDPATH

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
image=localhost/grpc-batcher-proof:$$
port=50061 # the chroot has this machine's network
folder=$(mktemp -d)
container=
server=

# The served process itself, which writes its id first: buildah hands no SIGTERM on.
server_process() { sed -n 's/^pid //p' "$folder/log"; }

clean_up() {
  if [ -n "$server" ]; then
    kill -KILL "$(server_process)" 2>/dev/null || kill "$server" 2>/dev/null || true
    wait "$server" || true
  fi
  if [ -n "$container" ]; then buildah rm "$container" >/dev/null || true; fi
  buildah rmi "$image" >/dev/null 2>&1 || true
  rm -rf "$folder"
}
trap clean_up EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

says() { printf '\n== %s\n' "$*"; }

fail() {
  echo "NOT SO: $*" >&2
  cat "$folder/log" >&2 || true
  exit 1
}

in_image() { buildah run --isolation chroot "$container" -- "$@"; }

wait_for() {
  local tries
  for tries in $(seq 240); do
    if "$@" >/dev/null 2>&1; then return; fi
    sleep 0.5
  done
  fail "after $tries tries still not: $*"
}

if [ -z "${BASE_IMAGE:-}" ]; then
  says "debootstrap makes a base"
  BASE_IMAGE=localhost/jammy
  debootstrap --variant=minbase --components=main,universe jammy "$folder/jammy" http://archive.ubuntu.com/ubuntu
  base=$(buildah from scratch)
  buildah add --quiet "$base" "$folder/jammy" /
  buildah commit --quiet --rm "$base" "$BASE_IMAGE"
fi

says "the image builds; the tests pass on the way"
read -r -a options <<<"${BUILD_OPTIONS:-}"
buildah build --isolation chroot --layers --format docker --file "$root/docker/Dockerfile" --tag "$image" \
  --build-arg "BASE_IMAGE=$BASE_IMAGE" ${options[@]+"${options[@]}"} "$root"
container=$(buildah from --pull-never "$image")
buildah copy --quiet "$container" "$root/docker/model.py" /srv/model.py

says "it runs as a user without privileges"
in_image id
test "$(in_image id -u)" = 10001 || fail "that is another user"

says "it serves a function, and is healthy by the image's own check"
# shellcheck disable=SC2016  # the container's shell expands these
in_image sh -c 'echo "pid $$"; exec grpc-batcher serve "$@"' sh \
  model:answer --model repr --batch-size 16 --batch-timeout-s 0.005 --port "$port" >"$folder/log" 2>&1 &
server=$!
wait_for in_image env "GRPC_BATCHER_CHECK_ADDRESS=localhost:$port" grpc-batcher check
cat "$folder/log"

says "4 callers get the answers to 100 requests each"
in_image python -c "
from concurrent.futures import ThreadPoolExecutor
from grpc_batcher import MukoeBatcherClient
def ask(caller):
    return [client.send_request(b'%d-%d-a' % (caller, i), timeout_s=30) for i in range(100)]
with MukoeBatcherClient('localhost:$port') as client, ThreadPoolExecutor(4) as threads:
    for caller, answers in enumerate(threads.map(ask, range(4))):
        assert [answer['result'] for answer, _ in answers] == [b'%d-%d-A' % (caller, i) for i in range(100)]
        print(f'caller {caller}: {len(answers)} answers, in batches of up to {max(size for _, size in answers)}')
" || fail "these are not the answers"

says "SIGTERM: the status is 0"
kill -TERM "$(server_process)"
status=0
wait "$server" || status=$?
server=
echo "status $status"
test "$status" = 0 || fail "the status is not 0"

says "all of it is so"
