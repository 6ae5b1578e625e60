#!/usr/bin/env bash
# Builds the image of docker/Dockerfile and shows that it does what docker/README.md says; ends with 0 if all of it does.
#
#   CONTAINER_ENGINE  docker (with buildx) or podman; by default the first of them that answers
#   BASE_IMAGE        an image of Debian or Ubuntu; by default the Dockerfile's
#   BUILD_OPTIONS     further options of the engine's build, such as --secret id=pip_conf,src=/etc/pip.conf
set -euo pipefail
unset CDPATH # with it, cd prints where it went

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
engine=
image=localhost/grpc-batcher-proof:$$ # a tag of its own, which is removed in the end
server=grpc-batcher-proof-$$
folder=$(mktemp -d)

clean_up() {
  if [ -n "$engine" ]; then
    "$engine" rm --force "$server" >/dev/null 2>&1 || true
    "$engine" image rm "$image" >/dev/null 2>&1 || true
  fi
  rm -rf "$folder"
}
trap clean_up EXIT

trap 'exit 130' INT
trap 'exit 143' TERM

candidates=(docker podman)
if [ -n "${CONTAINER_ENGINE:-}" ]; then candidates=("$CONTAINER_ENGINE"); fi
for candidate in "${candidates[@]}"; do
  if "$candidate" info >/dev/null; then
    engine=$candidate
    break
  fi
done
if [ -z "$engine" ]; then
  echo "No container engine answers (tried: ${candidates[*]}). scripts/prove_with_buildah.sh needs none." >&2
  exit 1
fi

says() { printf '\n== %s\n' "$*"; }

fail() {
  echo "NOT SO: $*" >&2
  "$engine" logs "$server" >&2 || true
  exit 1
}

in_image() { "$engine" run --rm --interactive --entrypoint "$1" "$image" "${@:2}"; }

# A caller in a container of its own that shares the server's network.
caller() {
  "$engine" run --rm --interactive --network "container:$server" --entrypoint python "$image" -c "
from grpc_batcher import MukoeBatcherClient
with MukoeBatcherClient('localhost:50051') as client:
    print(*(client.send_request(data, timeout_s=30)[0]['result'].decode() for data in (b'a', b'b', b'$1')))
"
}

wait_for() {
  local tries
  for tries in $(seq 120); do
    if "$@" >/dev/null 2>&1; then return; fi
    sleep 0.5
  done
  fail "after $tries tries still not: $*"
}

# Not `grep -q`: it leaves at the first match, the engine then fails to write, and with pipefail all of it has failed.
server_logged() { "$engine" logs "$server" 2>&1 | grep "$1" >/dev/null; }

says "the image builds; the tests pass on the way"
read -r -a options <<<"${BUILD_OPTIONS:-}"
if [ -n "${BASE_IMAGE:-}" ]; then options+=(--build-arg "BASE_IMAGE=$BASE_IMAGE"); fi
BUILDAH_FORMAT=docker DOCKER_BUILDKIT=1 "$engine" build --file "$root/docker/Dockerfile" --tag "$image" \
  ${options[@]+"${options[@]}"} "$root"

says "it has no compiler and no pip, and runs as a user without privileges"
# shellcheck disable=SC2016  # the container's shell expands these
in_image sh -ec 'id; test "$(id -u)" = 10001; for tool in cc gcc g++ clang make pip; do
  if command -v $tool; then echo "has $tool"; exit 1; fi; done' || fail "it has more than it needs"
"$engine" image ls "$image"

says "README's first example runs in it"
awk '/^```python$/ { on = 1; next } /^```$/ { if (on) exit } on' "$root/README.md" >"$folder/example.py"
output=$(in_image python - <"$folder/example.py")
echo "$output"
test "$output" = "({'result': b'hi'}, 0)" || fail "that is not what README says"

says "it serves a function, and is healthy"
cat >"$folder/slow.py" <<'PYTHON'
import time


def answer(requests):
    if b"slow" in requests:
        print("a slow batch", flush=True)
        time.sleep(3)
    return [({"result": data.upper()}, 0) for data in requests]
PYTHON
chmod 755 "$folder"
"$engine" run --detach --name "$server" --mount "type=bind,source=$folder/slow.py,target=/srv/slow.py,readonly" "$image" \
  serve slow:answer --model repr --batch-size 8 --batch-timeout-s 0.005 --grace-s 20 >/dev/null
wait_for "$engine" exec "$server" grpc-batcher check
case $engine in
  *podman) "$engine" healthcheck run "$server" || fail "podman finds it unhealthy" ;;
  *) wait_for sh -c "'$engine' inspect --format '{{.State.Health.Status}}' $server | grep -x healthy >/dev/null" ;;
esac

says "callers in other containers get their answers"
output=$(caller c)
echo "$output"
test "$output" = "A B C" || fail "these are not the answers"

says "SIGTERM while a callback runs: its caller is answered, and the status is 0"
caller slow >"$folder/answers" &
wait_for server_logged "a slow batch"
"$engine" stop --time 30 "$server" >/dev/null
wait $! || fail "the caller failed"
cat "$folder/answers"
test "$(cat "$folder/answers")" = "A B SLOW" || fail "these are not the answers"
status=$("$engine" inspect --format '{{.State.ExitCode}}' "$server")
echo "status $status"
test "$status" = 0 || fail "the status is not 0"

says "all of it is so"
