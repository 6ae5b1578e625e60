"""The command line as a user sees it: processes, what they print, and their exit status."""

from __future__ import annotations

import inspect
import json
import os
import pty
import re
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import urllib.request
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from grpc_batcher import MukoeBatcherClient, create_batcher, info
from grpc_batcher._cli.command import command as grpc_batcher_command
from grpc_batcher._cli.report import Point, knee

import click
import grpc
import numpy as np
import pytest
import trustme
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from serving import (
    Program,
    address_of,
    echo,
    error_of,
    eventually,
    finish_program,
    in_background,
    serving,
    start_program,
)

SERVE = ("--batch-size", "4", "--batch-timeout-s", "0", "--host", "127.0.0.1", "--port", "0")
REPR = ("functions:echo", "--model", "repr", *SERVE)
ARRAYS = ("functions:double", "--model", "repr", *SERVE)
QUICK = ("--duration-s", "0.5", "--warm-up-s", "0.1")

FUNCTIONS = """
import pathlib, time

import grpc_batcher

import grpc

number = 3


def echo(requests):
    return [({"result": request}, 0) for request in requests]


def echo_action(requests):
    return [({"result": data}, action) for data, action in requests]


def hold(requests):
    "Wait until the file `released` exists."
    while not pathlib.Path("released").exists():
        time.sleep(0.002)
    return echo(requests)


@grpc_batcher.arrays(data=grpc_batcher.Array((2,), "uint8"))
def double(batch):
    print("a batch of", batch.size, flush=True)
    return {"result": 2 * batch["data"]}, 5


@grpc_batcher.arrays(image=grpc_batcher.Array((2,), "uint8"), state=grpc_batcher.Array((), "float32"))
def named(batch):
    return dict(batch)


@grpc_batcher.arrays(data=grpc_batcher.Array((2,), "uint8"))
def fails(batch):
    raise RuntimeError("no\\ndevice")


@grpc_batcher.arrays(data=grpc_batcher.Array((2,), "uint8"))
def returns_nothing(batch):
    pass


class Token(grpc.ServerInterceptor):
    def intercept_service(self, continuation, details):
        if ("token", "sesame") in details.invocation_metadata:
            return continuation(details)
        return grpc.stream_stream_rpc_method_handler(
            lambda _, context: context.abort(grpc.StatusCode.UNAUTHENTICATED, "who are you?")
        )


token = Token()
"""


def write_modules(folder: Path) -> None:
    """Write modules that can be served, and some that cannot."""
    (folder / "functions.py").write_text(FUNCTIONS)
    (folder / "broken.py").write_text("import nosuchmodule")
    (folder / "exits.py").write_text("raise SystemExit('two\\nlines')")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder that contains the modules."""
    write_modules(tmp_path)
    return tmp_path


def start(
    folder: Path,
    *arguments: str,
    environment: dict[str, str] | None = None,
    command: tuple[str, ...] = (sys.executable, "-m", "grpc_batcher"),
    **options: Any,
) -> Program:
    """Start the command line in a folder."""
    return Program(
        [*command, *arguments],
        **{
            "cwd": folder,
            "env": {**os.environ, "PYTHONFAULTHANDLER": "1", **(environment or {})},
            "stdin": subprocess.DEVNULL,
            "stdout": subprocess.PIPE,
            "stderr": subprocess.PIPE,
            "text": True,
            "start_new_session": True,
            **options,
        },
    )


def run(folder: Path, *arguments: str, environment: dict[str, str] | None = None) -> tuple[int, str, str]:
    """Run the command line; return its status, stdout and stderr."""
    with start(folder, *arguments, environment=environment) as program:
        return finish_program(program)


@contextmanager
def command_serving(
    folder: Path, *arguments: str, environment: dict[str, str] | None = None, status: int = 0
) -> Iterator[tuple[Program, str]]:
    """Run `serve`. Yields the program and its address; SIGTERM must then end it with this status."""
    with start(folder, "serve", *arguments, environment=environment) as program:
        line = program.read_line()
        said = re.fullmatch(r"serving '\w+' on (.+)", line)
        if not said:
            raise AssertionError(f"it printed {line!r}: {finish_program(program)}")
        yield program, said[1]
        if program.poll() is None:
            program.send_signal(signal.SIGTERM)
        ended = finish_program(program)
        assert ended[0] == status, ended


@contextmanager
def taken_port() -> Iterator[int]:
    """A port that another program listens on."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


# ---- help ----

COMMANDS = {command.name: command for command in grpc_batcher_command.commands.values()}


@pytest.mark.parametrize("name", COMMANDS)
def test_the_help_of_a_command_describes_each_option_and_names_its_variable(name: str, folder: Path) -> None:
    status, output, errors = run(folder, name, "--help")
    assert (status, errors) == (0, "")
    said = "".join(output.split())
    options = [parameter for parameter in COMMANDS[name].params if isinstance(parameter, click.Option)]
    assert len(options) > 5 or name == "info"  # which has none
    for option in options:
        variable = f"GRPC_BATCHER_{name}_{option.opts[0].removeprefix('--').replace('-', '_')}".upper()
        assert option.help
        assert "".join(option.help.split()) in said
        assert option.opts[0] in output
        assert f"[envvar:{variable}" in said
    for argument in COMMANDS[name].params:
        if isinstance(argument, click.Argument):
            assert argument.envvar in output


def test_info_prints_what_the_function_returns_for_a_process_that_serves(folder: Path) -> None:
    status, output, errors = run(folder, "info")
    assert (status, errors) == (0, "")
    printed = dict(re.split(r" {2,}", line, maxsplit=1) for line in output.splitlines())
    here = info()
    assert printed.keys() == here.keys()
    for name in ("grpc_batcher", "python", "grpcio", "protobuf", "numpy", "kernel", "libc"):
        assert printed[name] == here[name]
    assert re.match("(tuned|left alone): (?!this process has neither)", printed["memory"])


def test_serve_has_an_option_for_every_parameter_of_create_batcher_with_its_default() -> None:
    options = {option.name: option for option in COMMANDS["serve"].params}
    required = {"functions:echo", "--model=repr", "--batch-size=1", "--batch-timeout-s=0"}
    parsed = COMMANDS["serve"].make_context("serve", sorted(required, reverse=True)).params
    given_otherwise = {"num_threads", "batch_process_fn", "credentials", "interceptors", "health", "arrays"}
    for name, parameter in inspect.signature(create_batcher).parameters.items():
        if name not in given_otherwise:
            assert options[name].required == (parameter.default is inspect.Parameter.empty), name
            assert options[name].required or parsed[name] == parameter.default, name
    assert "health" in options


def test_without_a_command_it_lists_the_commands_and_exits_with_2(folder: Path) -> None:
    status, output, errors = run(folder)
    assert (status, output) == (2, "")
    assert all(f"\n  {name} " in errors for name in COMMANDS)


def test_the_command_lines_in_the_readme_use_only_options_that_exist() -> None:
    text = (Path(__file__).parent.parent / "README.md").read_text()
    lines = re.findall(r"^grpc-batcher (\w+) ([^#\n]*)", text, re.MULTILINE)
    assert {name for name, _ in lines} == set(COMMANDS)
    for name, arguments in lines:
        context = COMMANDS[name].make_context(name, arguments.split())
        assert context.params or name == "info"


def test_the_installed_script_finds_functions_in_the_current_folder(
    folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    text = (Path(__file__).parent.parent / "pyproject.toml").read_text()
    ((module, function),) = re.findall(r'^grpc-batcher = "([\w.]+):(\w+)"$', text, re.MULTILINE)
    script = tmp_path_factory.mktemp("bin") / "grpc-batcher"  # like the one that pip installs
    script.write_text(
        f"import sys\nfrom {module} import {function}\nif __name__ == '__main__':\n    sys.exit({function}())"
    )
    with start(folder, "serve", *REPR, command=(sys.executable, str(script))) as server:
        address = server.read_line().rpartition(" ")[2]
        with start(
            folder, "bench", address, "--callers", "1", *QUICK, command=(sys.executable, str(script))
        ) as program:
            status, output, errors = finish_program(program)
        server.send_signal(signal.SIGTERM)
        assert finish_program(server)[0] == 0
    assert (status, errors) == (0, "")
    assert "Knee: 1 caller (" in output


def test_the_version_option_has_no_environment_variable(folder: Path) -> None:
    status, _, errors = run(folder, "serve", environment={"GRPC_BATCHER_VERSION": "7.1"})
    assert (status, errors) == (2, "grpc-batcher serve: Missing argument 'MODULE:FUNCTION'.\n")


# ---- errors ----

ERRORS = [
    (["nosuch"], "grpc-batcher: No such command 'nosuch'"),
    (["serve", "functions:echo"], "grpc-batcher serve: Missing option '--model'"),
    (["serve", "functions:echo", "--model", "zzz"], "'zzz'"),
    (["serve", *REPR, "--nosuch"], "--nosuch"),
    (["serve", "functions", *REPR[1:]], "'functions' is not of the form package.module:object"),
    (["serve", "nosuchmodule:f", *REPR[1:]], "cannot import 'nosuchmodule': ModuleNotFoundError"),
    (["serve", "broken:f", *REPR[1:]], "cannot import 'broken': ModuleNotFoundError: No module named 'nosuchmodule'"),
    (["serve", "exits:f", *REPR[1:]], "cannot import 'exits': SystemExit: two lines"),
    (["serve", "functions:nosuch", *REPR[1:]], "'functions' has no 'nosuch'"),
    (["serve", "functions:number", *REPR[1:]], "'functions:number' is 3, which is not callable"),
    (["serve", *REPR, "--batch-size", "0"], "--batch-size is 0; it must be an int from 1"),
    (["serve", *REPR, "--max-queue-size", "3"], "--max-queue-size is 3; it must be at least batch_size (4)"),
    (["serve", *REPR, "--max-queue-bytes", "0"], "--max-queue-bytes is 0; it must be an int from 1"),
    (["serve", *REPR, "--warm-up"], "--warm-up is True; without arrays it must be a list of requests"),
    (["serve", *REPR, "--batch-sizes", "1,4"], "--batch-sizes is [1, 4], which needs arrays=: without it nothing is"),
    (["serve", *ARRAYS, "--batch-sizes", "1,few"], "'1,few' is not a list of numbers such as 1,4,16"),
    (["serve", *ARRAYS, "--batch-sizes", "1,2"], "--batch-sizes is (1, 2); it must be ints from 1 to batch_size (4)"),
    (["serve", "functions:echo", "--model", "arrays", *SERVE], "--model is 'arrays', which needs arrays"),
    (["serve", "functions:named", "--model", "repr", *SERVE], "the only name is 'data'"),
    (
        ["serve", "functions:fails", *ARRAYS[1:], "--warm-up"],
        "cannot start: RuntimeError: no device (--log-level debug shows where)",
    ),
    (
        ["serve", "functions:returns_nothing", *ARRAYS[1:], "--warm-up"],
        "the callback cannot be warmed up: it must return a mapping from names to arrays",
    ),
    (["serve", *REPR, "--batch-timeout-s", "nan"], "--batch-timeout-s is nan; it must be a number of seconds"),
    (["serve", *REPR, "--grace-s", "inf"], "'inf' is not a number of seconds from 0 to"),
    (["serve", *REPR, "--host", "nosuch.invalid"], "cannot listen on nosuch.invalid:0"),
    (
        ["serve", *REPR, "--host", "unix:/nosuch/socket"],
        "cannot listen on unix:/nosuch/socket: the folder /nosuch does not exist",
    ),
    (["serve", *REPR, "--interceptor", "functions:echo"], "'functions:echo' is <function echo"),
    (["serve", *REPR, "--tls-cert", "nosuch.pem"], "File 'nosuch.pem' does not exist"),
    (["serve", *REPR, "--tls-key", "broken.py"], "--tls-cert and --tls-key go together"),
    (
        ["serve", *REPR, "--tls-cert", "broken.py", "--tls-key", "broken.py"],
        "--tls-cert broken.py: it contains no readable PEM cert",
    ),
    (["serve", *REPR, "--tls-client-ca", "broken.py"], "--tls-client-ca needs --tls-cert"),
    (
        ["serve", *REPR, "--port", "50999", "--metrics-port", "50999"],
        "--metrics-port and --port are both 50999; they must differ",
    ),
    (["bench", "localhost"], "'localhost' has no port"),
    (["bench", "localhost:65537"], "'localhost:65537' has a port above 65535"),
    (["check", "localhost:1", "--metadata", "a b=x"], "the key 'a b'"),
    (["check", "localhost:1", "--metadata", "a-bin=x"], "a str for 'a-bin'; '-bin' keys take bytes"),
    (["bench", "nosuch.invalid:1"], "'nosuch.invalid:1' does not resolve"),
    (["bench", "localhost:1", "--callers", "1,0"], "'1,0' is not a list of numbers above 0"),
    (["bench", "localhost:1", "--callers", "few"], "'few' is not a list of numbers above 0"),
    (["bench", "localhost:1", "--duration-s", "0"], "'0' is not a number of seconds above 0"),
    (["bench", "localhost:1", "--metadata", "sesame"], "the value is not of the form key=value"),
    (["bench", "localhost:1", "--action", "9999999999"], "9999999999"),
    (["bench", "localhost:1", "--payload-file", "nosuch"], "'nosuch' does not exist"),
    (["bench", "localhost:1", "--json", "nosuch/a.json"], "--json nosuch/a.json: the folder nosuch does not exist"),
    (["bench", "localhost:1", "--picture", "a.txt"], "--picture a.txt: its name must end with one of"),
    (["bench", "localhost:1", "--tls-ca", "broken.py"], "--tls-ca broken.py: it contains no readable PEM certificates"),
    (["check", "localhost"], "'localhost' has no port"),
    (["check", "nosuch.invalid:1"], "'nosuch.invalid:1' does not resolve"),
    (["check", "localhost:1", "--timeout-s", "-1"], "'-1' is not a number of seconds above 0"),
    (["check", "localhost:1", "--tls-cert", "broken.py"], "--tls-cert and --tls-key go together"),
]


# Runs all command lines of ERRORS in one process, because importing gRPC takes most of the time. Marks on stderr
# separate what each wrote there, including what did not go through Python.
RUN_ALL = """\
import json, sys

from grpc_batcher._cli import command

sys.stderr.reconfigure(line_buffering=True)
for arguments in json.load(sys.stdin):
    print(command.run(arguments), flush=True)
    print("MARK", file=sys.stderr)
"""


@pytest.fixture(scope="module")
def error_results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, str]]:
    """The status of each command line of ERRORS, and what it wrote to stderr."""
    folder = tmp_path_factory.mktemp("errors")
    write_modules(folder)
    with start_program(folder, RUN_ALL) as program:
        status, output, errors = finish_program(program, json.dumps([arguments for arguments, _ in ERRORS]))
    assert status == 0, errors
    results = zip(output.splitlines(), errors.split("MARK\n")[:-1], strict=True)
    return {" ".join(arguments): result for (arguments, _), result in zip(ERRORS, results, strict=True)}


@pytest.mark.parametrize(("arguments", "message"), [(" ".join(arguments), message) for arguments, message in ERRORS])
def test_a_failure_prints_one_line_and_exits_with_2(
    arguments: str, message: str, error_results: dict[str, tuple[str, str]]
) -> None:
    status, errors = error_results[arguments]
    assert status == "2"
    assert message in errors
    assert re.fullmatch(r"grpc-batcher.*: .+\n", errors)  # one line: a dot matches no newline


def test_serve_prints_one_line_and_exits_with_2_if_its_port_is_in_use(folder: Path) -> None:
    with taken_port() as port:
        status, output, errors = run(folder, "serve", *REPR, "--port", str(port))
    assert (status, output) == (2, "")
    assert re.fullmatch(rf"grpc-batcher serve: cannot listen on 127.0.0.1:{port}: .+ in use\n", errors)


def test_serve_prints_one_line_and_exits_with_2_if_its_metrics_port_is_in_use(folder: Path) -> None:
    with taken_port() as port:
        arguments = ("serve", *REPR, "--metrics-host", "127.0.0.1", "--metrics-port", str(port))
        status, output, errors = run(folder, *arguments)
    assert (status, output) == (2, "")
    assert re.fullmatch(rf"grpc-batcher serve: --metrics-port: cannot listen on 127.0.0.1:{port}: .+ in use\n", errors)


def test_bench_prints_one_line_and_exits_with_2_if_there_is_no_server(folder: Path) -> None:
    address = f"127.0.0.1:{free_port()}"
    status, output, errors = run(folder, "bench", address)
    assert (status, output) == (2, "")
    assert re.fullmatch(rf"grpc-batcher bench: {address} did not answer: UNAVAILABLE: .+\n", errors)


def test_log_level_debug_shows_where_an_import_failed(folder: Path) -> None:
    status, _, errors = run(folder, "serve", "broken:f", *REPR[1:], "--log-level", "debug")
    assert status == 2
    assert "Traceback" in errors
    assert 'broken.py", line 1' in errors


WITHOUT = """\
import runpy, sys

sys.modules[sys.argv.pop(1)] = None
runpy.run_module("grpc_batcher", run_name="__main__", alter_sys=True)
"""


@pytest.mark.parametrize(
    ("module", "extra", "arguments"),
    [
        ("click", "cli", ["serve", *REPR]),
        ("grpc_health", "health", ["check", "localhost:1"]),
        ("grpc_health", "health", ["serve", *REPR, "--health"]),
        ("grpc_reflection", "reflection", ["serve", *REPR, "--reflection"]),
        ("prometheus_client", "prometheus", ["serve", *REPR, "--metrics-port", "0"]),
        ("numpy", "arrays", ["serve", *ARRAYS]),
        ("matplotlib", "bench", ["bench", "localhost:1", "--picture", "a.png"]),
    ],
)
def test_a_command_that_needs_a_missing_extra_says_what_to_install(
    module: str, extra: str, arguments: list[str], folder: Path
) -> None:
    with start_program(folder, WITHOUT, module, *arguments) as program:
        status, output, errors = finish_program(program)
    assert (status, output) == (2, "")
    assert f'pip install "grpc-batcher[{extra}]"' in errors
    assert errors.count("\n") == 1


def test_serve_works_without_the_health_extra(folder: Path) -> None:
    with start_program(folder, WITHOUT, "grpc_health", "serve", *REPR) as program:
        address = program.read_line().rpartition(" ")[2]
        with MukoeBatcherClient(address) as client:
            assert client.send_request(b"hi") == ({"result": b"hi"}, 0)
        assert run(folder, "check", address)[::2] == (1, f"{address}: the server has no health service\n")
        program.send_signal(signal.SIGTERM)
        assert finish_program(program)[0] == 0


# ---- serve ----


def test_serve_serves_a_function_of_the_current_folder(folder: Path) -> None:
    with command_serving(folder, *REPR) as (_, address), MukoeBatcherClient(address) as client:
        assert re.fullmatch(r"127\.0\.0\.1:[1-9]\d*", address)
        assert client.send_request(b"hi") == ({"result": b"hi"}, 0)


def test_serve_serves_dyna_on_a_unix_socket(folder: Path) -> None:
    arguments = ("functions:echo_action", "--model", "dyna", *SERVE, "--host", f"unix:{folder}/socket")
    with command_serving(folder, *arguments) as (_, address), MukoeBatcherClient(address) as client:
        assert address == f"unix:{folder}/socket"
        assert client.send_request(b"hi", 3) == ({"result": b"hi"}, 3)


def test_serve_serves_a_function_that_declares_its_arrays(folder: Path) -> None:
    with (
        command_serving(folder, *ARRAYS, "--batch-sizes", "2,4") as (program, address),
        MukoeBatcherClient(address, arrays=True) as client,
    ):
        answer, step = client.send_request(np.array([1, 2], np.uint8))
        assert (answer["result"].tolist(), step) == ([2, 4], 5)
        assert program.read_line() == "a batch of 2"


def test_serve_serves_named_arrays(folder: Path) -> None:
    with (
        command_serving(folder, "functions:named", "--model", "arrays", *SERVE) as (_, address),
        MukoeBatcherClient(address, arrays=True) as client,
    ):
        answer, _ = client.send_request(image=np.array([1, 2], np.uint8), state=np.float32(0.5))
        assert (answer["image"].tolist(), answer["state"].tolist()) == ([1, 2], 0.5)


def test_serve_warms_up_before_it_says_that_it_serves(folder: Path) -> None:
    with start(folder, "serve", *ARRAYS, "--batch-sizes", "4,1", "--warm-up") as program:
        assert [program.read_line() for _ in range(2)] == ["a batch of 1", "a batch of 4"]
        assert program.read_line().startswith("serving 'repr' on ")
        program.send_signal(signal.SIGTERM)
        status, _, errors = finish_program(program)
    assert status == 0
    assert re.findall(r"INFO grpc_batcher: warmed up with (\d) rows in [\d.]+ s", errors) == ["1", "4"]


def test_log_level_debug_shows_where_a_warm_up_failed(folder: Path) -> None:
    arguments = ("serve", "functions:fails", *ARRAYS[1:], "--warm-up", "--log-level", "debug")
    status, _, errors = run(folder, *arguments)
    assert status == 2
    assert re.search(r'functions\.py", line \d+, in fails', errors)


def test_options_may_come_from_the_environment_and_the_command_line_wins(folder: Path) -> None:
    environment = {
        "GRPC_BATCHER_SERVE_FUNCTION": "functions:echo_action",
        "GRPC_BATCHER_SERVE_MODEL": "dyna",
        "GRPC_BATCHER_SERVE_BATCH_SIZE": "7",
        "GRPC_BATCHER_SERVE_BATCH_TIMEOUT_S": "0",
        "GRPC_BATCHER_SERVE_HOST": "nosuch.invalid",
        "GRPC_BATCHER_SERVE_PORT": "0",
        "GRPC_BATCHER_SERVE_HEALTH": "false",
        "GRPC_BATCHER_SERVE_MAX_MESSAGE_BYTES": "100",
    }
    with command_serving(folder, "--host", "127.0.0.1", environment=environment) as (_, address):
        with MukoeBatcherClient(address) as client:
            assert client.send_request(b"hi", 3) == ({"result": b"hi"}, 3)
            assert error_of(client.send_request, bytes(200), 3).code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        asked = run(folder, "check", environment={"GRPC_BATCHER_CHECK_ADDRESS": address})
    assert asked[::2] == (1, f"{address}: the server has no health service\n")


def test_a_bad_value_in_the_environment_is_reported_like_a_bad_option(folder: Path) -> None:
    status, _, errors = run(folder, "serve", *REPR, environment={"GRPC_BATCHER_SERVE_GRACE_S": "soon"})
    assert status == 2
    assert re.fullmatch(r"grpc-batcher serve: .*'--grace-s'.*'soon' is not a number of seconds.*\n", errors)


def test_an_interceptor_decides_who_is_served(folder: Path) -> None:
    with command_serving(folder, *REPR, "--interceptor", "functions:token") as (_, address):
        with MukoeBatcherClient(address) as client:
            assert error_of(client.send_request, b"hi").code() is grpc.StatusCode.UNAUTHENTICATED
        assert run(folder, "check", address)[0] == 1
        assert run(folder, "check", address, "--metadata", "token=sesame")[0] == 0
        bench = ("bench", address, "--callers", "1", *QUICK)
        assert run(folder, *bench)[0] == 2
        assert run(folder, *bench, "--metadata", "token=sesame")[0] == 0


def metrics_of(url: str) -> dict[str, float]:
    """Return the samples of a scrape by name, added up over all labels."""
    with urllib.request.urlopen(url) as response:
        lines = [line for line in response.read().decode().splitlines() if line and line[0] != "#"]
    samples: Counter[str] = Counter()
    for line in lines:
        name, value = line.rsplit(" ", 1)
        samples[name.partition("{")[0]] += float(value)  # type: ignore[assignment]
    return dict(samples)


METRICS = ("--metrics-port", "0")


def serving_lines(program: Program) -> tuple[str, str]:
    """Return the URL of the metrics and the address of a `serve` with METRICS."""
    first, second = program.read_line(), program.read_line()
    url = re.fullmatch(r"metrics on (http://127\.0\.0\.1:\d+/metrics)", first)
    address = re.fullmatch(r"serving 'repr' on (.+)", second)
    assert url, first
    assert address, second
    return url[1], address[1]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_after_a_signal_under_load_serve_answers_what_it_took_in_and_exits_with_0(
    number: signal.Signals, folder: Path
) -> None:
    function = ("functions:hold", *REPR[1:], "--batch-size", "1", *METRICS)
    with start(folder, "serve", *function) as program:
        url, address = serving_lines(program)
        with MukoeBatcherClient(address) as client:
            requests = [in_background(client.send_request, b"%d" % which) for which in range(6)]
            eventually(lambda: metrics_of(url)["grpc_batcher_waiting_requests"] == 5)
            program.send_signal(number)
            assert program.stderr is not None
            assert f" {number.name}: " in program.stderr.readline()
            eventually(lambda: metrics_of(url)["grpc_batcher_ready"] == 0)
            assert error_of(client.send_request, b"late").code() is grpc.StatusCode.UNAVAILABLE
            (folder / "released").touch()
            answers = [request.result() for request in requests]
        assert answers == [({"result": b"%d" % which}, 0) for which in range(6)]
        assert finish_program(program) == (0, "", "")


def test_requests_left_when_the_grace_period_ends_get_unavailable_and_serve_exits_with_0(folder: Path) -> None:
    with start(folder, "serve", "functions:hold", *REPR[1:], "--grace-s", "0.1", *METRICS) as program:
        url, address = serving_lines(program)
        with MukoeBatcherClient(address) as client:
            request = in_background(client.send_request, b"hi")
            eventually(lambda: metrics_of(url)["grpc_batcher_batches_total"] == 1)
            program.send_signal(signal.SIGTERM)
            error = request.exception()
        assert isinstance(error, grpc.RpcError)
        assert error.code() is grpc.StatusCode.UNAVAILABLE
        status, _, errors = finish_program(program)
    assert status == 0
    assert "shutdown after a grace period of 0.1 s left 1 requests unanswered" in errors


def test_a_scrape_of_serve_shows_the_batchers_counts_and_the_processs(folder: Path) -> None:
    with start(folder, "serve", *REPR, *METRICS) as program:
        url, address = serving_lines(program)
        with MukoeBatcherClient(address) as client:
            for _ in range(3):
                client.send_request(b"hi")
        samples = metrics_of(url)
        assert samples["grpc_batcher_requests_total"] == 3
        assert samples["process_start_time_seconds"] > 0
        program.send_signal(signal.SIGTERM)
        assert finish_program(program)[0] == 0


def listens(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port)).close()
    except ConnectionRefusedError:
        return False
    return True


@pytest.mark.parametrize(
    ("arguments", "others"),
    [
        (("--host", "127.0.0.1"), False),
        (("--host", "0.0.0.0"), True),
        (("--host", "0.0.0.0", "--metrics-host", "127.0.0.1"), False),
        (("--host", "unix:socket"), False),
    ],
    ids=["one address", "every address", "an address of their own", "a unix socket"],
)
def test_the_metrics_are_served_on_the_host_of_the_server_or_on_their_own(
    arguments: tuple[str, ...], others: bool, folder: Path
) -> None:
    """Other machines must not reach the metrics of a server that listens on 127.0.0.1."""
    with start(folder, "serve", *REPR, *METRICS, *arguments) as program:
        shown = re.fullmatch(r"metrics on http://(.+):(\d+)/metrics", program.read_line())
        assert shown
        assert program.read_line().startswith("serving")
        port = int(shown[2])
        assert shown[1] == ("0.0.0.0" if others else "127.0.0.1")
        assert listens("127.0.0.1", port)
        assert listens("127.0.0.2", port) is others
        program.send_signal(signal.SIGTERM)
        assert finish_program(program)[0] == 0


def test_serve_bounds_the_queue_by_bytes(folder: Path) -> None:
    arguments = (*REPR, "--max-queue-bytes", "100")
    with command_serving(folder, *arguments) as (_, address), MukoeBatcherClient(address) as client:
        assert client.send_request(bytes(96)) == ({"result": bytes(96)}, 0)
        error = error_of(client.send_request, bytes(97))
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "max_queue_bytes" in error.details()


def test_serve_with_no_leave_early_waits_for_every_window(folder: Path) -> None:
    arguments = (*REPR, "--batch-timeout-s", "0.01", "--no-leave-early", *METRICS)
    with start(folder, "serve", *arguments) as program:
        url, address = serving_lines(program)
        with MukoeBatcherClient(address) as client:
            for _ in range(5):
                client.send_request(b"hi")
        with urllib.request.urlopen(url) as response:
            scrape = response.read().decode()
        assert re.findall(r'^grpc_batcher_batches_total\{.*reason="(\w+)"\} ([1-9].*)$', scrape, re.M) == [
            ("timeout", "5.0")
        ]
        program.send_signal(signal.SIGTERM)
        assert finish_program(program)[0] == 0


# ---- TLS ----


@pytest.fixture(scope="module")
def pem(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """PEM files of an authority, a server called batcher.test, a caller, and a stranger."""
    folder = tmp_path_factory.mktemp("pem")
    authority = trustme.CA()
    authority.cert_pem.write_to_path(folder / "ca")
    for name, issuer, host in (
        ("server", authority, "batcher.test"),
        ("caller", authority, "caller.test"),
        ("stranger", trustme.CA(), "caller.test"),
    ):
        certificate = issuer.issue_cert(host)
        certificate.cert_chain_pems[0].write_to_path(folder / f"{name}-cert")
        certificate.private_key_pem.write_to_path(folder / f"{name}-key")
    return {file.name: str(file) for file in folder.iterdir()}


def test_over_tls_only_callers_with_a_certificate_of_the_right_authority_are_served(
    folder: Path, pem: dict[str, str]
) -> None:
    own = ("--tls-cert", pem["server-cert"], "--tls-key", pem["server-key"], "--tls-client-ca", pem["ca"])
    trusting = ("--tls-ca", pem["ca"], "--tls-server-name", "batcher.test")
    caller = (*trusting, "--tls-cert", pem["caller-cert"], "--tls-key", pem["caller-key"])
    stranger = (*trusting, "--tls-cert", pem["stranger-cert"], "--tls-key", pem["stranger-key"])
    with command_serving(folder, *REPR, *own) as (_, address):
        assert run(folder, "check", address, *caller) == (0, "SERVING\n", "")
        assert run(folder, "bench", address, "--callers", "1", *QUICK, *caller)[0] == 0
        for refused in ((), trusting, stranger, ("--tls-ca", pem["ca"], *caller[4:])):
            assert run(folder, "check", address, "--timeout-s", "2", *refused)[0] == 1


def test_a_key_that_does_not_match_its_certificate_is_reported_before_anything_starts(
    folder: Path, pem: dict[str, str]
) -> None:
    status, output, errors = run(
        folder, "serve", *REPR, "--tls-cert", pem["server-cert"], "--tls-key", pem["caller-key"]
    )
    assert (status, output) == (2, "")
    assert errors == (
        f"grpc-batcher serve: --tls-key {pem['caller-key']}: it does not match --tls-cert {pem['server-cert']}\n"
    )


def test_a_file_that_is_not_a_key_is_reported_before_anything_starts(folder: Path, pem: dict[str, str]) -> None:
    status, output, errors = run(folder, "serve", *REPR, "--tls-cert", pem["server-cert"], "--tls-key", pem["ca"])
    assert (status, output) == (2, "")
    assert re.fullmatch(
        rf"grpc-batcher serve: --tls-key {pem['ca']}: it contains no readable, unencrypted PEM private key: .+\n",
        errors,
    )


# ---- check ----


@contextmanager
def health_server(status: str) -> Iterator[str]:
    """Run a plain grpcio server whose health service gives this status for the service "model"."""
    servicer = health.HealthServicer()
    servicer.set("model", health_pb2.HealthCheckResponse.ServingStatus.Value(status))
    with ThreadPoolExecutor(2) as threads:
        server = grpc.server(threads)
        health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        try:
            yield f"127.0.0.1:{port}"
        finally:
            server.stop(None).wait()


@pytest.mark.parametrize("said", ["SERVING", "NOT_SERVING", "UNKNOWN"])
def test_check_exits_with_0_only_if_the_service_says_serving(said: str, folder: Path) -> None:
    with health_server(said) as address:
        status, output, errors = run(folder, "check", address, "--service", "model")
    expected = (0, "SERVING\n", "") if said == "SERVING" else (1, "", f"{address}: {said}\n")
    assert (status, output, errors) == expected


def test_check_reports_a_server_started_by_serve_as_serving(folder: Path) -> None:
    with command_serving(folder, *REPR) as (_, address):
        assert run(folder, "check", address) == (0, "SERVING\n", "")


def test_check_exits_with_1_for_an_unknown_service(folder: Path) -> None:
    with health_server("SERVING") as address:
        assert run(folder, "check", address, "--service", "x") == (1, "", f"{address}: the server has no service 'x'\n")


def test_check_exits_with_1_if_there_is_no_server(folder: Path) -> None:
    address = f"127.0.0.1:{free_port()}"
    status, output, errors = run(folder, "check", address)
    assert (status, output) == (1, "")
    assert re.fullmatch(rf"{address}: UNAVAILABLE: .+\n", errors)


def test_check_exits_with_1_if_a_server_never_answers(folder: Path) -> None:
    with taken_port() as port:
        status, output, errors = run(folder, "check", f"127.0.0.1:{port}", "--timeout-s", "0.3")
    assert (status, output) == (1, "")
    assert re.fullmatch(rf"127.0.0.1:{port}: DEADLINE_EXCEEDED: .+\n", errors)


# ---- bench ----


def test_the_report_of_bench_agrees_with_the_servers_own_counts(folder: Path) -> None:
    with serving() as batcher:
        status, output, errors = run(
            folder, "bench", address_of(batcher), "--callers", "3,1,2", *QUICK, "--json", "b.json", "--picture", "b.png"
        )
        counts = batcher.metrics().requests
    assert (status, errors) == (0, "")
    record = json.loads((folder / "b.json").read_text())
    points = record["points"]
    assert [point["callers"] for point in points] == [1, 2, 3]
    assert record["requests_ahead"] + sum(point["sent"] for point in points) == counts["OK"]
    assert dict(counts) == {"OK": counts["OK"]}
    for point in points:
        assert 0 < point["answers"] < point["sent"]  # the warm-up does not count
        assert point["requests_per_s"] == pytest.approx(point["answers"] / record["duration_s"])
        assert 0 < point["p50_ms"] <= point["p90_ms"] <= point["p99_ms"]
        assert (point["errors"], point["silent_callers"]) == ({}, 0)
    head, *table = output.splitlines()[:4]
    assert head.split() == ["callers", "requests/s", "p50", "ms", "p90", "ms", "p99", "ms", "errors"]
    for line, point in zip(table, points, strict=True):
        latencies = [f"{point[name]:.2f}" for name in ("p50_ms", "p90_ms", "p99_ms")]
        assert line.split() == [str(point["callers"]), f"{point['requests_per_s']:.1f}", *latencies, "0"]
    assert f"Knee: {record['knee']['callers']} caller" in output
    assert record["knee"]["rule"] in output
    assert (folder / "b.png").read_bytes().startswith(b"\x89PNG")


def test_bench_sends_the_given_payload_and_action_from_several_processes(folder: Path) -> None:
    seen: set[Any] = set()

    def note(requests: list[Any]) -> list[Any]:
        seen.update(requests)
        return echo(requests)

    (folder / "payload").write_bytes(b"an observation")
    with serving(note, model="dyna") as batcher:
        arguments = ("--callers", "1,3", "--processes", "2", "--payload-file", "payload", "--action", "7")
        status, _, errors = run(folder, "bench", address_of(batcher), *QUICK, *arguments, "--json", "b.json")
    assert (status, errors, seen) == (0, "", {(b"an observation", 7)})
    record = json.loads((folder / "b.json").read_text())
    assert (record["model"], record["processes"], record["payload_bytes"]) == ("dyna", 2, 14)
    assert [point["callers"] for point in record["points"]] == [1, 3]


def test_bench_counts_failed_requests_and_exits_with_1(folder: Path) -> None:
    first = threading.Event()

    def fail_some(requests: list[Any]) -> list[Any]:
        was_first = not first.is_set()
        first.set()
        return [answer if was_first else RuntimeError("no") for answer in echo(requests)]

    with serving(fail_some) as batcher:
        status, output, errors = run(
            folder, "bench", address_of(batcher), "--callers", "2", *QUICK, "--json", "b.json", "--picture", "b.svg"
        )
        failed = batcher.metrics().requests["INTERNAL"]
    assert (status, errors) == (1, "")
    (point,) = json.loads((folder / "b.json").read_text())["points"]
    assert point["errors"] == {"INTERNAL": failed}
    assert (point["sent"], point["answers"], point["p50_ms"], point["silent_callers"]) == (failed, 0, None, 2)
    assert f"2 callers: {failed} of {failed} requests failed with INTERNAL." in output
    assert "Knee: none" in output


def test_bench_shows_its_progress_only_on_a_terminal(folder: Path) -> None:
    ours, terminal = pty.openpty()
    with serving() as batcher, open(ours, "rb", buffering=0) as screen:
        with start(folder, "bench", address_of(batcher), "--callers", "2", *QUICK, stderr=terminal) as program:
            os.close(terminal)
            status, output, _ = finish_program(program)
        shown = screen.read(65536).decode()
    assert status == 0
    assert "2 callers: warming up" in shown
    assert re.search(r"2 callers: 0\.\d of 0\.5 s, \d+ answers", shown)
    assert shown.endswith("\r\x1b[K")  # the line is cleared at the end
    assert "\x1b" not in output


def callers_of(program: Program) -> list[int]:
    """Return the running processes of a bench's callers."""
    children = Path(f"/proc/{program.pid}/task/{program.pid}/children").read_text().split()
    return [int(child) for child in children if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()]


def test_an_interrupted_bench_ends_its_callers_and_prints_one_line(folder: Path) -> None:
    with serving() as batcher:
        arguments = ("bench", address_of(batcher), "--callers", "2", "--duration-s", "1000", "--processes", "2")
        with start(folder, *arguments) as program:
            eventually(lambda: batcher.metrics().requests.get("OK", 0) > 100)
            callers = callers_of(program)
            os.killpg(program.pid, signal.SIGINT)  # as a terminal does
            status, _, errors = finish_program(program)
    assert (status, errors) == (130, "grpc-batcher bench: interrupted\n")
    assert len(callers) == 2
    assert not any(Path(f"/proc/{caller}").exists() for caller in callers)


def test_a_bench_that_loses_a_process_of_callers_prints_one_line_and_exits_with_2(folder: Path) -> None:
    with serving() as batcher:
        arguments = ("bench", address_of(batcher), "--callers", "2", "--duration-s", "1000", "--processes", "2")
        with start(folder, *arguments) as program:
            eventually(lambda: batcher.metrics().requests.get("OK", 0) > 100)
            os.kill(callers_of(program)[0], signal.SIGKILL)
            status, _, errors = finish_program(program)
    assert (status, errors) == (2, "grpc-batcher bench: a process of callers ended with exit status -9\n")


def point(callers: int, requests_per_s: float) -> Point:
    return Point(callers, requests_per_s, 1.0, 1.0, 1.0, int(requests_per_s), int(requests_per_s), {}, 0, 0.5)


@pytest.mark.parametrize(
    ("throughputs", "expected"),
    [
        ({1: 100}, 1),
        ({1: 100, 2: 200, 4: 400}, 4),
        ({1: 100, 2: 360, 4: 400}, 2),
        ({1: 100, 2: 359.9, 4: 400}, 4),
        ({1: 100, 2: 400, 4: 300}, 2),
        ({1: 0, 2: 0}, None),
    ],
)
def test_the_knee_is_the_fewest_callers_with_90_percent_of_the_best_throughput(
    throughputs: dict[int, float], expected: int | None
) -> None:
    found = knee([point(callers, requests_per_s) for callers, requests_per_s in throughputs.items()])
    assert (found.callers if found else None) == expected


def test_a_token_in_the_environment_may_contain_spaces_and_no_error_shows_it(folder: Path) -> None:
    secret = {"GRPC_BATCHER_CHECK_METADATA": "authorization=Bearer s3cr3t\nteam=blue"}
    status, _, errors = run(folder, "check", "127.0.0.1:1", environment=secret)
    assert (status, errors.partition(":")[0]) == (1, "127.0.0.1")
    for wrong in ("s3cr3t", "authorization=s3cr3t\r"):
        status, _, errors = run(folder, "check", "127.0.0.1:1", environment={"GRPC_BATCHER_CHECK_METADATA": wrong})
        assert status == 2
        assert "s3cr3t" not in errors


SLOW_MODULE = """
    import time
    print("loading", flush=True)
    while True:  # a single long sleep would not notice a signal that comes just before it starts
        time.sleep(0.01)
"""


def test_sigterm_ends_serve_while_it_loads_its_module(folder: Path) -> None:
    """Even as process 1 of a container, for which the signal has no default action."""
    (folder / "slow.py").write_text(textwrap.dedent(SLOW_MODULE))
    with start(folder, "serve", "slow:function", *REPR[1:]) as program:
        assert program.read_line() == "loading"
        caught = Path(f"/proc/{program.pid}/status").read_text().partition("SigCgt:")[2].split()[0]
        assert int(caught, 16) & 1 << (signal.SIGTERM - 1)  # process 1 gets only signals it has a handler for
        program.send_signal(signal.SIGTERM)
        assert finish_program(program)[0] == 128 + signal.SIGTERM
