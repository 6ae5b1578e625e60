#!/usr/bin/env bash
# Builds the image of docker/Dockerfile and shows that it does what docker/README.md says. Exits with 0 if it all does.
#
#   CONTAINER_ENGINE  docker (with buildx), podman or buildah; by default the first of them that answers
#   BASE_IMAGE        an image of Debian or Ubuntu; by default the Dockerfile's
#   BUILD_OPTIONS     further options of the build, such as --secret id=pip_conf,src=/etc/pip.conf
#
# buildah builds and runs in chroots: it needs root on Debian or Ubuntu, but nothing from the kernel that an engine
# needs, such as cgroups or a network of its own. Without BASE_IMAGE, debootstrap makes it a base of Ubuntu 22.04.
set -euo pipefail
unset CDPATH # with it, cd prints where it went

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
engine=
image=localhost/grpc-batcher-proof:$$ # a tag of its own, which is removed in the end
server=grpc-batcher-proof-$$
port=50051
folder=$(mktemp -d)
container= # buildah's
process=   # of buildah's run, which the server is a child of

clean_up() {
  case $engine in
    *buildah)
      if [ -n "$process" ]; then
        kill -KILL "$(server_process)" 2>/dev/null || kill "$process" 2>/dev/null || true
        wait "$process" || true
      fi
      if [ -n "$container" ]; then "$engine" rm "$container" >/dev/null || true; fi
      "$engine" rmi "$image" >/dev/null 2>&1 || true
      ;;
    ?*)
      "$engine" rm --force "$server" >/dev/null 2>&1 || true
      "$engine" image rm "$image" >/dev/null 2>&1 || true
      ;;
  esac
  rm -rf "$folder"
}
trap clean_up EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

says() { printf '\n== %s\n' "$*"; }

fail() {
  echo "FAILED: $*" >&2
  server_log >&2 || true
  exit 1
}

wait_for() {
  local tries
  for tries in $(seq 240); do
    if "$@" >/dev/null 2>&1; then return; fi
    sleep 0.5
  done
  fail "gave up after $tries tries: $*"
}

candidates=(docker podman buildah)
if [ -n "${CONTAINER_ENGINE:-}" ]; then candidates=("$CONTAINER_ENGINE"); fi
said=()
for candidate in "${candidates[@]}"; do
  if answer=$("$candidate" info 2>&1 >/dev/null); then
    engine=$candidate
    break
  fi
  said+=("$candidate: $answer")
done
if [ -z "$engine" ]; then
  printf '%s\n' "${said[@]}" "Neither a container engine nor buildah answers (tried: ${candidates[*]})." >&2
  exit 1
fi

# ---- what the engine and buildah do differently ----

case $engine in
  *buildah)
    port=50061 # a chroot has this machine's network

    build() {
      if [ -z "${BASE_IMAGE:-}" ]; then
        local base
        BASE_IMAGE=localhost/jammy
        debootstrap --variant=minbase --components=main,universe jammy "$folder/jammy" http://archive.ubuntu.com/ubuntu
        base=$("$engine" from scratch)
        "$engine" add --quiet "$base" "$folder/jammy" /
        "$engine" commit --quiet --rm "$base" "$BASE_IMAGE"
      fi
      "$engine" build --isolation chroot --layers --format docker "$@" --build-arg "BASE_IMAGE=$BASE_IMAGE" "$root"
      container=$("$engine" from --pull-never "$image")
      "$engine" copy --quiet "$container" "$root/docker/model.py" "$folder/slow.py" /srv/
    }

    in_image() { "$engine" run --isolation chroot "$container" -- "$@"; }
    beside_server() { in_image "$@"; }

    # The server writes its process id first: buildah passes no SIGTERM on.
    serve() {
      # shellcheck disable=SC2016  # the container's shell expands these
      in_image sh -c 'echo "pid $$"; exec grpc-batcher serve "$@"' sh "$@" >"$folder/log" 2>&1 &
      process=$!
    }
    server_process() { sed -n 's/^pid //p' "$folder/log"; }
    server_log() { cat "$folder/log"; }
    is_healthy() { in_image env "GRPC_BATCHER_CHECK_ADDRESS=localhost:$port" grpc-batcher check; }

    stop_server() {
      kill -TERM "$(server_process)"
      status=0
      wait "$process" || status=$?
      process=
    }
    ;;
  *)
    build() {
      if [ -n "${BASE_IMAGE:-}" ]; then set -- "$@" --build-arg "BASE_IMAGE=$BASE_IMAGE"; fi
      BUILDAH_FORMAT=docker DOCKER_BUILDKIT=1 "$engine" build "$@" "$root"
      "$engine" image ls "$image"
    }

    in_image() { "$engine" run --rm --interactive --entrypoint "$1" "$image" "${@:2}"; }
    # In a container of its own that shares the server's network.
    beside_server() {
      "$engine" run --rm --interactive --network "container:$server" --entrypoint "$1" "$image" "${@:2}"
    }

    serve() {
      "$engine" run --detach --name "$server" \
        --mount "type=bind,source=$root/docker/model.py,target=/srv/model.py,readonly" \
        --mount "type=bind,source=$folder/slow.py,target=/srv/slow.py,readonly" "$image" serve "$@" >/dev/null
    }
    server_log() { "$engine" logs "$server" 2>&1; }

    is_healthy() {
      "$engine" exec "$server" grpc-batcher check || return 1
      case $engine in
        *podman) "$engine" healthcheck run "$server" ;;
        *) "$engine" inspect --format '{{.State.Health.Status}}' "$server" | grep -x healthy ;;
      esac
    }

    stop_server() {
      "$engine" stop --time 30 "$server" >/dev/null
      status=$("$engine" inspect --format '{{.State.ExitCode}}' "$server")
    }
    ;;
esac

# Not `grep -q`: it exits at the first match, the engine then fails to write, and with pipefail the pipeline fails.
server_logged() { server_log | grep "$1" >/dev/null; }

# ---- the proof ----

cat >"$folder/slow.py" <<'PYTHON'
import time

import model


def answer(requests):
    if b"slow" in requests:
        print("a slow batch", flush=True)
        time.sleep(3)
    return model.answer(requests)
PYTHON
chmod 755 "$folder"
chmod 644 "$folder/slow.py"

says "the image builds; the tests pass on the way"
read -r -a options <<<"${BUILD_OPTIONS:-}"
build --file "$root/docker/Dockerfile" --tag "$image" ${options[@]+"${options[@]}"}

says "it has no compiler and no pip, and runs as a user without privileges"
# shellcheck disable=SC2016  # the container's shell expands these
in_image sh -ec 'id; test "$(id -u)" = 10001; for tool in cc gcc g++ clang make pip; do
  if command -v $tool; then echo "has $tool"; exit 1; fi; done' || fail "it has more than it needs"

says "README's first example runs in it"
awk '/^```python$/ { on = 1; next } /^```$/ { if (on) exit } on' "$root/README.md" | sed "s/50051/$port/" \
  >"$folder/example.py"
output=$(in_image python - <"$folder/example.py")
echo "$output"
test "$output" = "({'result': b'hi'}, 0)" || fail "that is not what README says"

says "it serves a function, and is healthy"
serve slow:answer --model repr --batch-size 16 --batch-timeout-s 0.005 --grace-s 20 --port "$port"
wait_for is_healthy
server_log

says "4 callers get the answers to 100 requests each"
beside_server python -c "
from concurrent.futures import ThreadPoolExecutor
from grpc_batcher import MukoeBatcherClient
def ask(caller):
    return [client.send_request(b'%d-%d-a' % (caller, i), timeout_s=30) for i in range(100)]
with MukoeBatcherClient('localhost:$port') as client, ThreadPoolExecutor(4) as threads:
    for caller, answers in enumerate(threads.map(ask, range(4))):
        assert [answer['result'] for answer, _ in answers] == [b'%d-%d-A' % (caller, i) for i in range(100)]
        print(f'caller {caller}: {len(answers)} answers, in batches of up to {max(size for _, size in answers)}')
" || fail "these are not the answers"

says "SIGTERM while a callback runs: its caller is answered, and the status is 0"
beside_server python -c "
from grpc_batcher import MukoeBatcherClient
with MukoeBatcherClient('localhost:$port') as client:
    print(client.send_request(b'slow', timeout_s=30))
" >"$folder/answer" &
caller=$!
wait_for server_logged "a slow batch"
stop_server
wait "$caller" || fail "the caller failed"
cat "$folder/answer"
test "$(cat "$folder/answer")" = "({'result': b'SLOW'}, 1)" || fail "that is not the answer"
echo "status $status"
test "$status" = 0 || fail "the status is not 0"

says "all of it is so"
