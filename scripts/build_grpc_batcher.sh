#!/usr/bin/env bash
# Builds and tests the wheel in containers; `help` lists the modes. It runs from any folder, and again at any time.
set -euo pipefail
unset CDPATH # with it, cd prints where it went

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
checkout=$(printf %s "$root" | cksum | cut -d ' ' -f 1) # two checkouts do not share containers
one_off="grpc_batcher-build-$checkout-$$"
interactive="grpc_batcher-interactive-$checkout"
image="localhost/grpc_batcher-build-$checkout"
engine=
remove_on_exit=
child=
made=

print_help() {
  cat <<'HELP'
usage: scripts/build_grpc_batcher.sh [MODE]

  help                   print this
  build_e2e              build the wheel in a one-off container, test it, and copy it to dist/ (the default)
  build_py_interactive   build the wheel and install it in a container that stays
  test_py_interactive    run the tests in that container; further arguments go to pytest
  build_cpp_interactive  compile only the native modules, in that container, and load them
  teardown               remove the containers

build_e2e's wheel is for the Python of the base image, and for Linux with that image's glibc or a newer one. `make
wheels` builds wheels for glibc 2.17 or newer and for every Python found here; it needs no container engine.

Environment variables:
  CONTAINER_ENGINE  docker (with buildx) or podman; by default the first of them that answers
  BASE_IMAGE        an image of Debian or Ubuntu; by default ubuntu:22.04
  BUILD_OPTIONS     further options of the engine's build, such as --secret id=pip_conf,src=/etc/pip.conf
  RUN_OPTIONS       further options of the engine's run and create, such as --network=host

`pip install .` installs from source, without a container engine.
HELP
}

fail() {
  printf '%s\n' "$@" >&2
  exit 1
}

find_engine() {
  local candidates=(docker podman) candidate answer said=()
  if [ -n "${CONTAINER_ENGINE:-}" ]; then candidates=("$CONTAINER_ENGINE"); fi
  for candidate in "${candidates[@]}"; do
    if ! command -v "$candidate" >/dev/null; then
      said+=("$candidate: not found")
    elif answer=$("$candidate" info 2>&1 >/dev/null); then
      engine=$candidate
      return
    else
      said+=("$candidate: $answer")
    fi
  done
  fail "${said[@]}" \
    "No container engine answers (tried: ${candidates[*]}). Install docker or podman, start it, or name one in" \
    "CONTAINER_ENGINE. Without an engine, \`make wheels\` builds the wheels; \`pip install .\` installs from source."
}

# Runs a command in the background and waits: bash handles signals only between commands, or in a wait.
interruptible() {
  "$@" <&0 &
  child=$!
  local status=0
  wait "$child" || status=$?
  child=
  return "$status"
}

container_exists() { "$engine" container inspect "$1" >/dev/null 2>&1; }

clean_up() {
  # This first, or it might create the container after we looked for it.
  if [ -n "$child" ]; then
    kill "$child" 2>/dev/null || true
    wait "$child" 2>/dev/null || true
  fi
  if [ -n "$made" ]; then rm -rf "$made"; fi
  if [ -n "$remove_on_exit" ] && container_exists "$remove_on_exit"; then
    "$engine" rm --force "$remove_on_exit" >/dev/null
  fi
}
trap clean_up EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

# The image of one stage of docker/Dockerfile.
build_image() {
  local options
  read -r -a options <<<"${BUILD_OPTIONS:-}"
  if [ -n "${BASE_IMAGE:-}" ]; then options+=(--build-arg "BASE_IMAGE=$BASE_IMAGE"); fi
  # podman keeps the image's health check only in docker's format.
  DOCKER_BUILDKIT=1 BUILDAH_FORMAT=docker interruptible "$engine" build --file "$root/docker/Dockerfile" \
    --target "$1" --tag "$image:$1" ${options[@]+"${options[@]}"} "$root"
}

build_e2e() {
  local options wheel
  read -r -a options <<<"${RUN_OPTIONS:-}"
  build_image test
  remove_on_exit=$one_off
  interruptible "$engine" create --name "$one_off" ${options[@]+"${options[@]}"} "$image:test" true >/dev/null
  mkdir -p "$root/dist"
  made=$(mktemp -d "$root/dist/.made-XXXXXX")
  interruptible "$engine" cp "$one_off:/wheels/." "$made"
  for wheel in "$made"/*.whl; do
    mv -f "$wheel" "$root/dist"
    echo "$root/dist/${wheel##*/}"
  done
  echo "It is for the Python of ${BASE_IMAGE:-ubuntu:22.04}, and for Linux with that image's glibc or a newer one." \
    "\`make wheels\` builds wheels for an older glibc and for every Python found here."
}

# The container that stays has the project in /source, read-only. Its `sleep` would ignore SIGTERM.
start_interactive() {
  local options
  if container_exists "$interactive"; then
    "$engine" start "$interactive" >/dev/null
    return
  fi
  read -r -a options <<<"${RUN_OPTIONS:-}"
  build_image build
  remove_on_exit=$interactive
  interruptible "$engine" run --detach --stop-signal KILL --name "$interactive" --volume "$root:/source:ro" \
    ${options[@]+"${options[@]}"} "$image:build" sleep infinity >/dev/null
}

in_interactive() { interruptible "$engine" exec "$interactive" "$@"; }

# shellcheck disable=SC2016  # the container's shell expands these
copy_sources='rm -rf /work && mkdir /work && cd /source && tar --exclude=./.git --exclude="./.venv*" --exclude=./build \
  --exclude=./dist --exclude="*.so" -cf - . | tar -C /work -xf -'

# shellcheck disable=SC2016
build_wheel='rm -rf /wheels && /build-tools/bin/pip wheel --no-deps --wheel-dir /wheels /work &&
  { test -x /tested/bin/pip || python3 -m venv /tested; } &&
  /tested/bin/pip install --quiet --force-reinstall --no-deps /wheels/*.whl &&
  /tested/bin/pip install --quiet "$(ls /wheels/*.whl)[test]"'

compile_native='cd /work && /build-tools/bin/pip install --quiet "setuptools>=77" "cython>=3.2.9" &&
  /build-tools/bin/python setup.py build_ext --build-lib /native'

load_native='
import importlib.util, pathlib, sys
files = sorted(pathlib.Path("/native/grpc_batcher").glob("*.so"))
if not files:
    sys.exit("there is no native module in /native/grpc_batcher")
for file in files:
    name = "grpc_batcher." + file.name.partition(".")[0]
    spec = importlib.util.spec_from_file_location(name, file)
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    print(f"{name}: {file} loads")
'

build_py_interactive() {
  start_interactive
  in_interactive sh -ec "$copy_sources"
  in_interactive sh -ec "$build_wheel"
  remove_on_exit=
  echo "The wheel is in /wheels of the container $interactive, and installed there."
}

test_py_interactive() {
  if ! container_exists "$interactive"; then
    fail "There is no container to test in; run \`scripts/build_grpc_batcher.sh build_py_interactive\` first."
  fi
  "$engine" start "$interactive" >/dev/null
  if ! in_interactive test -x /tested/bin/pytest; then
    fail "Nothing to test is installed in the container $interactive;" \
      "run \`scripts/build_grpc_batcher.sh build_py_interactive\` first."
  fi
  if [ $# -eq 0 ]; then set -- tests; fi
  interruptible "$engine" exec --workdir /work "$interactive" /tested/bin/pytest "$@"
}

build_cpp_interactive() {
  start_interactive
  in_interactive sh -ec "$copy_sources"
  in_interactive sh -ec "$compile_native"
  in_interactive python3 -c "$load_native"
  remove_on_exit=
}

teardown() {
  local names name
  names=$("$engine" ps --all --format '{{.Names}}') # not in the loop's head, which would go on if it failed
  for name in $names; do
    case $name in
      "$interactive" | "grpc_batcher-build-$checkout-"*)
        "$engine" rm --force "$name" >/dev/null
        echo "removed $name"
        ;;
    esac
  done
}

mode=${1:-build_e2e}
case $mode in
  help | -h | --help) print_help ;;
  build_e2e | build_py_interactive | test_py_interactive | build_cpp_interactive | teardown)
    find_engine
    "$mode" "${@:2}"
    ;;
  *)
    echo "unknown mode: $mode" >&2
    print_help
    exit 1
    ;;
esac
