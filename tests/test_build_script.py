"""What scripts/build_grpc_batcher.sh asks of a container engine, which is a stand-in that writes down its orders."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from serving import PROGRAM_LIMIT_S, eventually

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = "scripts/build_grpc_batcher.sh"
MODES = ["help", "build_e2e", "build_py_interactive", "test_py_interactive", "build_cpp_interactive", "teardown"]

# It keeps a file for each container, and fails at an order that has the words of FAIL in it; at those of HANG it waits,
# and at those of MAKE_LATE it makes the container only when it is told to end.
STAND_IN = f"""#!{sys.executable}
import json, os, pathlib, signal, sys, time
if os.environ.get("MAKE_LATE"):
    signal.pthread_sigmask(signal.SIG_BLOCK, {{signal.SIGTERM}})
state = pathlib.Path(os.environ["ENGINE_STATE"])
order = sys.argv[1:]
with open(state / "orders", "a") as orders:
    orders.write(json.dumps(order) + "\\n")
text = " ".join(order)
if os.environ.get("MAKE_LATE") and os.environ["MAKE_LATE"] in text:
    signal.sigwait({{signal.SIGTERM}})
    time.sleep(1)
if os.environ.get("HANG") and os.environ["HANG"] in text:
    while True:
        time.sleep(0.01)
if os.environ.get("FAIL") and os.environ["FAIL"] in text:
    sys.exit("told to fail")
containers = state / "containers"
containers.mkdir(exist_ok=True)
if order[0] in ("create", "run"):
    (containers / order[order.index("--name") + 1]).touch(exist_ok=False)
elif order[:2] == ["container", "inspect"]:
    sys.exit(0 if (containers / order[2]).exists() else 1)
elif order[0] == "start":
    sys.exit(0 if (containers / order[1]).exists() else 1)
elif order[0] == "rm":
    (containers / order[-1]).unlink()
elif order[0] == "ps":
    print(*(each.name for each in containers.iterdir()), sep="\\n")
elif order[0] == "cp":
    (pathlib.Path(order[2]) / "grpc_batcher-0-py3-none-any.whl").touch()
"""


class Engine:
    """The stand-in, and a copy of the script in a project of its own, in a path with spaces and a comma."""

    def __init__(self, folder: Path) -> None:
        self.project = folder / "my project, here"
        (self.project / "scripts").mkdir(parents=True)
        shutil.copy(ROOT / SCRIPT, self.project / SCRIPT)
        self.commands = folder / "commands"
        self.commands.mkdir()
        for name in ("bash", "env", "dirname", "cksum", "cut", "cat", "mkdir", "mktemp", "mv", "rm"):
            (self.commands / name).symlink_to(str(shutil.which(name)))
        self.elsewhere = folder / "else where"
        self.elsewhere.mkdir()
        self._state = folder / "state"
        self._state.mkdir()

    def install(self, name: str) -> Path:
        file = self.commands / name
        file.write_text(STAND_IN)
        file.chmod(0o755)
        return file

    def start(self, *arguments: str, **environment: str) -> subprocess.Popen[str]:
        surroundings = {"PATH": str(self.commands), "ENGINE_STATE": str(self._state), **environment}
        return subprocess.Popen(
            [str(self.project / SCRIPT), *arguments],
            cwd=self.elsewhere,
            env=surroundings,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def run(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        with self.start(*arguments, **environment) as program:
            output, errors = program.communicate(timeout=PROGRAM_LIMIT_S)
        return subprocess.CompletedProcess(program.args, program.returncode, output, errors)

    def succeed(self, *arguments: str, **environment: str) -> str:
        done = self.run(*arguments, **environment)
        assert done.returncode == 0, done.stderr
        return done.stdout

    @property
    def orders(self) -> list[list[str]]:
        """What the stand-in was told, without the questions."""
        file = self._state / "orders"
        lines = map(json.loads, file.read_text().splitlines()) if file.exists() else []
        return [line for line in lines if line[0] not in ("info", "container", "ps")]

    @property
    def verbs(self) -> list[str]:
        return [order[0] for order in self.orders]

    @property
    def containers(self) -> list[str]:
        return sorted(file.name for file in (self._state / "containers").glob("*"))


@pytest.fixture
def engine(tmp_path: Path) -> Engine:
    """With docker as the stand-in."""
    engine = Engine(tmp_path)
    engine.install("docker")
    return engine


def option(order: list[str], name: str) -> str:
    return order[order.index(name) + 1]


def test_help_lists_every_mode_and_needs_no_engine(tmp_path: Path) -> None:
    output = Engine(tmp_path).succeed("help")
    assert [line.split()[0] for line in output.splitlines() if line.startswith("  ")][: len(MODES)] == MODES


def test_an_unknown_mode_prints_the_help_and_exits_with_1(engine: Engine) -> None:
    done = engine.run("build_all")
    assert (done.returncode, done.stdout) == (1, engine.succeed("help"))
    assert done.stderr == "unknown mode: build_all\n"
    assert engine.orders == []


@pytest.mark.parametrize("arguments", [["build_e2e"], []], ids=["by name", "without a mode"])
def test_build_e2e_copies_the_tested_wheel_to_dist_and_leaves_no_container(
    engine: Engine, arguments: list[str]
) -> None:
    output = engine.succeed(*arguments)
    assert engine.verbs == ["build", "create", "cp", "rm"]
    assert option(engine.orders[0], "--target") == "test"
    assert engine.containers == []
    wheel = engine.project / "dist" / "grpc_batcher-0-py3-none-any.whl"
    assert list((engine.project / "dist").iterdir()) == [wheel]
    assert output.splitlines()[0] == str(wheel)
    assert "glibc" in output


def test_build_e2e_names_the_new_wheel_alone_and_leaves_the_others(engine: Engine) -> None:
    other = engine.project / "dist" / "grpc_batcher-0-py2-none-any.whl"
    other.parent.mkdir()
    other.touch()
    output = engine.succeed("build_e2e")
    assert other.exists()
    assert [Path(line).name for line in output.splitlines() if line.endswith(".whl")] == [
        "grpc_batcher-0-py3-none-any.whl"
    ]


def test_a_cdpath_does_not_lead_the_script_astray(engine: Engine) -> None:
    with subprocess.Popen(
        ["bash", SCRIPT, "build_e2e"],
        cwd=engine.project,
        env={"PATH": str(engine.commands), "ENGINE_STATE": str(engine._state), "CDPATH": f".:{engine.project}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as program:
        _, errors = program.communicate(timeout=PROGRAM_LIMIT_S)
    assert program.returncode == 0, errors
    assert engine.orders[0][-1] == str(engine.project)


def test_the_engine_builds_from_the_scripts_project_wherever_it_is_called_from(engine: Engine) -> None:
    engine.succeed("build_e2e")
    (build,) = [order for order in engine.orders if order[0] == "build"]
    assert build[-1] == str(engine.project)
    assert option(build, "--file") == str(engine.project / "docker" / "Dockerfile")
    assert list(engine.elsewhere.iterdir()) == []


def test_build_py_interactive_leaves_a_container_that_the_next_one_uses_again(engine: Engine) -> None:
    engine.succeed("build_py_interactive")
    assert engine.verbs == ["build", "run", "exec", "exec"]
    assert option(engine.orders[1], "--volume") == f"{engine.project}:/source:ro"
    (container,) = engine.containers
    engine.succeed("build_py_interactive")
    assert engine.verbs[4:] == ["start", "exec", "exec"]
    assert engine.containers == [container]


def test_test_py_interactive_runs_all_tests_or_those_that_are_named(engine: Engine) -> None:
    engine.succeed("build_py_interactive")
    (container,) = engine.containers
    engine.succeed("test_py_interactive")
    assert engine.orders[-1] == ["exec", "--workdir", "/work", container, "/tested/bin/pytest", "tests"]
    engine.succeed("test_py_interactive", "tests/test_core.py", "-k", "window or order")
    assert engine.orders[-1][-3:] == ["tests/test_core.py", "-k", "window or order"]


def test_test_py_interactive_without_a_container_says_what_to_run_first(engine: Engine) -> None:
    done = engine.run("test_py_interactive")
    assert done.returncode == 1
    assert "build_py_interactive" in done.stderr
    assert engine.orders == []


def test_test_py_interactive_after_build_cpp_interactive_alone_says_what_to_run_first(engine: Engine) -> None:
    engine.succeed("build_cpp_interactive")
    done = engine.run("test_py_interactive", FAIL="test -x /tested/bin/pytest")
    assert done.returncode == 1
    assert "Nothing to test is installed" in done.stderr
    assert "build_py_interactive" in done.stderr
    assert "/tested/bin/pytest tests" not in " ".join(engine.orders[-1])


def test_build_cpp_interactive_compiles_and_loads_the_native_modules_alone(engine: Engine) -> None:
    engine.succeed("build_cpp_interactive")
    assert engine.verbs == ["build", "run", "exec", "exec", "exec"]
    *_, compile_order, load_order = engine.orders
    assert "setup.py build_ext" in compile_order[-1]
    assert "pip wheel" not in " ".join(word for order in engine.orders for word in order)
    assert load_order[2] == "python3"
    assert len(engine.containers) == 1


def loading_program(folder: Path) -> str:
    """What the script loads the native modules with, for those in a folder."""
    text = (ROOT / SCRIPT).read_text()
    program = text[text.index("load_native='") + len("load_native='") :].partition("\n'")[0]
    return program.replace("/native/grpc_batcher", str(folder))


def test_the_program_that_loads_the_native_modules_runs(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(Path(sys.modules["grpc_batcher"].__file__ or "").parent, tmp_path / "grpc_batcher"))
    program = loading_program(folder)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=PROGRAM_LIMIT_S)
    assert done.returncode == 0, done.stderr
    loaded = [line.partition(":")[0] for line in done.stdout.splitlines()]
    assert loaded == ["grpc_batcher._arrays", "grpc_batcher._core", "grpc_batcher._wire"]


def test_the_program_that_loads_the_native_modules_fails_where_there_are_none(tmp_path: Path) -> None:
    program = loading_program(tmp_path)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=PROGRAM_LIMIT_S)
    assert (done.returncode, done.stderr) == (1, f"there is no native module in {tmp_path}\n")


def test_teardown_fails_if_the_engine_cannot_list_its_containers(engine: Engine) -> None:
    engine.succeed("build_py_interactive")
    done = engine.run("teardown", FAIL="ps --all")
    assert done.returncode != 0
    assert "told to fail" in done.stderr


def test_teardown_removes_this_projects_containers_and_no_others_and_may_run_again(engine: Engine) -> None:
    engine.succeed("build_py_interactive")
    others = engine._state / "containers" / "grpc_batcher-interactive-of-another-project"
    others.touch()
    engine.succeed("teardown")
    assert engine.containers == [others.name]
    assert engine.succeed("teardown") == ""


@pytest.mark.parametrize(
    ("mode", "fails_at"),
    [
        ("build_e2e", "build --file"),
        ("build_e2e", "create"),
        ("build_e2e", "cp"),
        ("build_py_interactive", "build --file"),
        ("build_py_interactive", "pip wheel"),
        ("build_cpp_interactive", "setup.py"),
        ("build_cpp_interactive", "importlib"),
    ],
)
def test_a_failure_in_the_middle_fails_the_script_and_leaves_no_container(
    engine: Engine, mode: str, fails_at: str
) -> None:
    done = engine.run(mode, FAIL=fails_at)
    assert done.returncode != 0
    assert "told to fail" in done.stderr
    assert engine.containers == []
    engine.succeed(mode)


def test_a_failure_leaves_the_container_that_was_there_before(engine: Engine) -> None:
    engine.succeed("build_py_interactive")
    containers = engine.containers
    assert engine.run("build_py_interactive", FAIL="pip wheel").returncode != 0
    assert engine.containers == containers


@pytest.mark.parametrize(("mode", "hangs_at"), [("build_py_interactive", "pip wheel"), ("build_e2e", "cp")])
def test_sigterm_to_the_script_alone_ends_it_while_the_engine_works_and_leaves_no_container(
    engine: Engine, mode: str, hangs_at: str
) -> None:
    with engine.start(mode, HANG=hangs_at) as program:
        eventually(lambda: any(hangs_at in " ".join(order) for order in engine.orders))
        program.terminate()
        program.communicate(timeout=PROGRAM_LIMIT_S)
    assert program.returncode == 128 + signal.SIGTERM
    assert engine.containers == []
    assert list(engine.project.glob("dist/*")) == list(engine.project.glob("dist/.*")) == []


def test_a_container_that_the_engine_makes_while_the_script_is_told_to_end_is_removed(engine: Engine) -> None:
    with engine.start("build_py_interactive", MAKE_LATE="run --detach") as program:
        eventually(lambda: engine.verbs[-1:] == ["run"])
        program.terminate()
        program.communicate(timeout=PROGRAM_LIMIT_S)
    assert program.returncode == 128 + signal.SIGTERM
    assert engine.verbs[-2:] == ["run", "rm"]
    assert engine.containers == []


@pytest.fixture
def heeds_ctrl_c() -> Iterator[None]:
    """Programs that are started heed SIGINT, also where the tests run in the background and ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("heeds_ctrl_c")
def test_ctrl_c_in_the_middle_leaves_no_container(engine: Engine) -> None:
    with engine.start("build_py_interactive", HANG="pip wheel") as program:
        eventually(lambda: engine.verbs[-2:] == ["exec", "exec"])
        os.killpg(program.pid, signal.SIGINT)
        program.communicate(timeout=PROGRAM_LIMIT_S)
    assert program.returncode != 0
    assert engine.containers == []


def test_without_an_engine_the_error_names_the_way_without_one(tmp_path: Path) -> None:
    done = Engine(tmp_path).run("build_e2e")
    assert done.returncode == 1
    assert "tried: docker podman" in done.stderr
    assert "make wheels" in done.stderr
    assert "pip install ." in done.stderr


def test_an_engine_that_does_not_answer_is_passed_over(engine: Engine, tmp_path: Path) -> None:
    done = engine.run("build_e2e", FAIL="info")
    assert done.returncode == 1
    assert "No container engine answers" in done.stderr
    assert "docker: told to fail\npodman: not found\n" in done.stderr


def test_podman_serves_where_there_is_no_docker(tmp_path: Path) -> None:
    engine = Engine(tmp_path)
    engine.install("podman")
    engine.succeed("build_e2e")
    assert engine.verbs == ["build", "create", "cp", "rm"]


def test_container_engine_chooses_a_path_with_spaces_too(engine: Engine, tmp_path: Path) -> None:
    chosen = tmp_path / "my engine"
    engine.install("docker").rename(chosen)
    engine.succeed("build_e2e", CONTAINER_ENGINE=str(chosen))
    assert engine.verbs == ["build", "create", "cp", "rm"]
    done = engine.run("build_e2e", CONTAINER_ENGINE="no such engine")
    assert (done.returncode, "tried: no such engine" in done.stderr) == (1, True)


def test_the_base_image_and_further_options_go_to_the_engine(engine: Engine) -> None:
    engine.succeed("build_py_interactive", BASE_IMAGE="debian:12", BUILD_OPTIONS="--pull --quiet", RUN_OPTIONS="--rm")
    build, start = engine.orders[:2]
    assert option(build, "--build-arg") == "BASE_IMAGE=debian:12"
    assert {"--pull", "--quiet"} <= set(build)
    assert "--rm" in start
