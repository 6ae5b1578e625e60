#!/usr/bin/env bash
# Builds and tests wheels with Pythons that this machine lacks, and tests the wheels of another processor, in Debian and
# Ubuntu roots made by debootstrap. Exits with 0 if all tests passed.
#
#   scripts/prove_pythons.sh [PYTHON...]              on this processor; by default 3.14 and 3.15
#   MACHINE=aarch64 scripts/prove_pythons.sh [PYTHON...]   emulated by qemu; by default all supported Pythons
#
#   WHEEL_TESTS, WHEEL_TARGETS    as for scripts/build_wheels.py, which runs in the root with WHEEL_KEEP=1: it adds to
#                                 dist/ and tests what is there. Wheels for another processor must be in dist/ already
#   DEBIAN_MIRROR, UBUNTU_MIRROR  where packages come from
#
# It needs root on Debian or Ubuntu, and the packages debootstrap and ubuntu-archive-keyring (on Ubuntu
# debian-archive-keyring); for another processor also qemu-user-static and binfmt-support. The roots stay in build/roots/
# for the next run; `make clean` removes them.
set -euo pipefail
unset CDPATH # with it, cd prints where it went

project=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
here=$(uname -m)
machine=${MACHINE:-$here}

fail() {
  echo "$*" >&2
  exit 1
}

[ "$(id -u)" = 0 ] || fail "debootstrap and chroot need root; run this as root"
command -v debootstrap >/dev/null || fail "debootstrap is missing: apt-get install debootstrap ubuntu-archive-keyring"
case $machine in
  x86_64) architecture=amd64 ubuntu=http://archive.ubuntu.com/ubuntu ;;
  aarch64) architecture=arm64 ubuntu=http://ports.ubuntu.com/ubuntu-ports ;;
  *) fail "MACHINE is $machine; it must be x86_64 or aarch64" ;;
esac
debian=${DEBIAN_MIRROR:-http://deb.debian.org/debian}
ubuntu=${UBUNTU_MIRROR:-$ubuntu}

if [ $# -gt 0 ]; then
  pythons=("$@")
elif [ "$machine" = "$here" ]; then
  pythons=(3.14 3.15)
else
  pythons=(3.10 3.11 3.12 3.13 3.14 3.15)
fi

if [ "$machine" != "$here" ]; then
  for python in "${pythons[@]}"; do
    compgen -G "$project/dist/grpc_batcher-*-cp${python/./}-*_$machine.whl" >/dev/null ||
      fail "dist/ has no wheel of Python $python for $machine; build it on this machine first, with make wheels or $0"
  done
  handler=/proc/sys/fs/binfmt_misc/qemu-$machine
  if ! [ -e "$handler" ]; then
    mountpoint --quiet /proc/sys/fs/binfmt_misc || mount -t binfmt_misc binfmt_misc /proc/sys/fs/binfmt_misc
    update-binfmts --enable "qemu-$machine" || true
  fi
  [ -e "$handler" ] || fail "the kernel does not start $machine programs: apt-get install qemu-user-static binfmt-support"
fi

# The release that has a Python, and the script of debootstrap that makes any release of that distribution.
suite_of() {
  case $1 in
    3.10) suite=jammy mirror=$ubuntu script=gutsy components=main,universe ;;
    3.11) suite=bookworm mirror=$debian script=sid components=main ;;
    3.12) suite=noble mirror=$ubuntu script=gutsy components=main,universe ;;
    3.13) suite=trixie mirror=$debian script=sid components=main ;;
    3.14 | 3.15) suite=testing mirror=$debian script=sid components=main ;;
    *) fail "no release of Debian or Ubuntu is known to have Python $1; give it one in suite_of, in $0" ;;
  esac
}

# Make build/roots/SUITE-ARCHITECTURE, if it is not there.
make_root() {
  root=$project/build/roots/$suite-$architecture
  if [ -e "$root.complete" ]; then return; fi
  local packages=ca-certificates version
  for version in 3.10 3.11 3.12 3.13 3.14 3.15; do
    if [ "$(suite_of "$version" && echo "$suite")" = "$suite" ]; then
      packages+=,python$version-venv
      if [ "$machine" = "$here" ]; then packages+=,python$version-dev; fi # its headers, to compile with
    fi
  done
  rm -rf "$root"
  mkdir -p "$root"
  debootstrap --arch="$architecture" --variant=minbase --components="$components" --include="$packages" \
    "$suite" "$root" "$mirror" "/usr/share/debootstrap/scripts/$script"
  touch "$root.complete"
}

# Run a command in a root, in /project. What it mounts and starts ends with it.
in_root() {
  # The package index may be behind this machine's own settings and certificates.
  cp -L /etc/resolv.conf /etc/hosts "$root/etc/"
  cp -L /etc/ssl/certs/ca-certificates.crt "$root/etc/ssl/certs/"
  if [ -e /etc/pip.conf ]; then cp -L /etc/pip.conf "$root/etc/"; fi
  mkdir -p "$root/project"
  # shellcheck disable=SC2016  # the inner shell expands these
  unshare --mount --propagation private --pid --fork --kill-child bash -euc '
    mount -t proc proc "$1/proc"
    mount --rbind /dev "$1/dev"
    mount --bind "$2" "$1/project"
    cd "$1"
    exec env HOME=/root PATH=/usr/sbin:/usr/bin:/sbin:/bin chroot . \
      sh -euc "cd /project; exec \"\$@\"" sh "${@:3}"
  ' bash "$root" "$project" "$@"
}

for python in "${pythons[@]}"; do
  suite_of "$python"
  printf '\n== Python %s on %s: %s\n' "$python" "$machine" "$suite"
  make_root
  builder=python$python
  if [ "$machine" = "$here" ]; then
    builder=/opt/tools-$python/bin/python
    in_root "python$python" -m venv "/opt/tools-$python"
    in_root "$builder" -m pip install --quiet "pip>=25.1"
    in_root "$builder" -m pip install --quiet --group dist
    targets=${WHEEL_TARGETS:-x86_64 aarch64}
  else
    targets=$machine
  fi
  in_root env WHEEL_KEEP=1 WHEEL_PYTHONS="$python" WHEEL_TARGETS="$targets" "$builder" scripts/build_wheels.py
done
