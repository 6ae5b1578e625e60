"""Who is served: TLS, client certificates and tokens. And the warning about a server without them."""

from __future__ import annotations

import logging
import re
import shutil
import subprocess
import threading
from pathlib import Path
from typing import Any

from grpc_batcher import MukoeBatcher, MukoeBatcherClient, create_batcher

import grpc
import pytest
from conftest import Certificates, Pair
from serving import PROGRAM_LIMIT_S, Held, address_of, answer, connect, echo, error_of, run_program, serving

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"

UNAVAILABLE, UNAUTHENTICATED = grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.UNAUTHENTICATED


def tls(certificates: Certificates) -> grpc.ServerCredentials:
    return grpc.ssl_server_credentials([certificates.server])


def mutual_tls(certificates: Certificates) -> grpc.ServerCredentials:
    return grpc.ssl_server_credentials([certificates.server], certificates.authority, require_client_auth=True)


def trusting(certificates: Certificates, own: Pair | None = None) -> grpc.ChannelCredentials:
    return grpc.ssl_channel_credentials(certificates.authority, *(own or ()))


def refused(client: MukoeBatcherClient, code: grpc.StatusCode) -> None:
    """Check that each of the client's requests fails with this code."""
    with client:
        for _ in range(2):
            assert error_of(client.send_request, b"from the wrong client").code() is code


# ---- TLS ----


def test_a_client_that_trusts_the_servers_authority_is_served(certificates: Certificates) -> None:
    with (
        serving(credentials=tls(certificates)) as batcher,
        connect(batcher, credentials=trusting(certificates)) as client,
    ):
        assert client.send_request(b"x") == answer(b"x")
        assert client.send_request(b"y" * 1_000_000) == answer(b"y" * 1_000_000)


def test_a_client_in_plaintext_or_with_another_authority_gets_unavailable(
    certificates: Certificates, strange_certificates: Certificates
) -> None:
    with (
        Held() as held,
        serving(held, credentials=tls(certificates)) as batcher,
        connect(batcher, credentials=trusting(certificates)) as right,
    ):
        held.release(1)
        refused(connect(batcher), UNAVAILABLE)
        refused(connect(batcher, credentials=trusting(strange_certificates)), UNAVAILABLE)
        assert right.send_request(b"x") == answer(b"x")
        assert held.batches == [[b"x"]]


def test_a_client_that_uses_tls_gets_unavailable_from_a_plaintext_server(certificates: Certificates) -> None:
    with serving() as batcher:
        refused(connect(batcher, credentials=trusting(certificates)), UNAVAILABLE)
        assert batcher.metrics().batched_requests == 0


def test_a_client_refuses_a_server_whose_certificate_is_for_another_name(certificates: Certificates) -> None:
    with serving(credentials=tls(certificates), host="127.0.0.1") as batcher:
        wrong_name = (("grpc.ssl_target_name_override", "elsewhere.example"),)
        refused(connect(batcher, credentials=trusting(certificates), options=wrong_name), UNAVAILABLE)
        assert batcher.metrics().batched_requests == 0


# ---- client certificates ----


def test_only_clients_with_a_certificate_of_the_servers_authority_are_served(
    certificates: Certificates, strange_certificates: Certificates
) -> None:
    with (
        Held() as held,
        serving(held, credentials=mutual_tls(certificates)) as batcher,
        connect(batcher, credentials=trusting(certificates, certificates.client)) as right,
    ):
        held.release(2)
        assert right.send_request(b"x") == answer(b"x")
        refused(connect(batcher, credentials=trusting(certificates)), UNAVAILABLE)
        refused(connect(batcher, credentials=trusting(certificates, strange_certificates.client)), UNAVAILABLE)
        assert right.send_request(b"y") == answer(b"y")
        assert held.batches == [[b"x"], [b"y"]]


@pytest.mark.parametrize(("option", "version"), [("-tls1_3", "TLSv1.3"), ("-tls1_2", "TLSv1.2")])
def test_tls_1_3_and_1_2_are_supported_with_http_2(option: str, version: str, certificates: Certificates) -> None:
    with serving(credentials=mutual_tls(certificates)) as batcher:
        said = openssl_says(batcher, certificates, option)
    assert f"New, {version}, Cipher is " in said, said
    assert "ALPN protocol: h2\n" in said
    assert "Verify return code: 0 (ok)" in said


def test_tls_1_1_is_not_supported(certificates: Certificates) -> None:
    with serving(credentials=mutual_tls(certificates)) as batcher:
        said = openssl_says(batcher, certificates, "-tls1_1", "-cipher", "ALL:@SECLEVEL=0")
    assert "New, (NONE), Cipher is (NONE)" in said, said


def openssl_says(batcher: MukoeBatcher, certificates: Certificates, *options: str) -> str:
    """Return what `openssl s_client` prints about a connection to a batcher."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed here")
    files = {
        "-CAfile": "authority.pem",
        "-cert": "client.pem",
        "-key": "client.key",
    }
    command = ["openssl", "s_client", "-connect", address_of(batcher), "-alpn", "h2", *options]
    for option, name in files.items():
        command += [option, str(certificates.folder / name)]
    said = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=PROGRAM_LIMIT_S, check=False)
    return (said.stdout + said.stderr).decode(errors="replace")  # it includes what the server sends


# ---- tokens ----


class TokenCheck(grpc.ServerInterceptor):  # type: ignore[misc]
    def intercept_service(self, continuation: Any, details: grpc.HandlerCallDetails) -> Any:
        if ("authorization", "Bearer right") in details.invocation_metadata:
            return continuation(details)
        return grpc.stream_stream_rpc_method_handler(self._refuse)

    @staticmethod
    def _refuse(_messages: object, context: grpc.ServicerContext) -> None:
        context.abort(UNAUTHENTICATED, "the token is missing or wrong")


@pytest.mark.parametrize("metadata", [(), (("authorization", "Bearer wrong"),), (("token", "Bearer right"),)])
def test_a_client_without_the_token_gets_unauthenticated(metadata: Any) -> None:
    with (
        Held() as held,
        serving(held, interceptors=[TokenCheck()]) as batcher,
        connect(batcher, metadata=(("authorization", "Bearer right"),)) as right,
    ):
        held.release(2)
        assert right.send_request(b"x") == answer(b"x")
        refused(connect(batcher, metadata=metadata), UNAUTHENTICATED)
        assert right.send_request(b"y") == answer(b"y")
        assert held.batches == [[b"x"], [b"y"]]


@pytest.mark.parametrize("kind", [iter, lambda checks: (check for check in checks)], ids=["iterator", "generator"])
def test_a_token_check_that_is_given_in_an_iterator_refuses_callers_without_the_token(kind: Any) -> None:
    """An iterator is empty the second time: were the checks of its items the first, no interceptor would be left."""
    with (
        serving(interceptors=kind([TokenCheck()])) as batcher,
        connect(batcher, metadata=kind([("authorization", "Bearer right")])) as right,
    ):
        for _ in range(2):
            refused(connect(batcher), UNAUTHENTICATED)
            refused(connect(batcher, metadata=kind([("authorization", "Bearer wrong")])), UNAUTHENTICATED)
            assert right.send_request(b"x") == answer(b"x")
        assert batcher.metrics().requests == {"OK": 2}


class SendToken(grpc.StreamStreamClientInterceptor):  # type: ignore[misc]
    def intercept_stream_stream(self, continuation: Any, details: Any, messages: Any) -> Any:
        metadata = (*(details.metadata or ()), ("authorization", "Bearer right"))
        return continuation(details._replace(metadata=metadata), messages)


def test_a_clients_interceptors_may_be_given_in_a_generator() -> None:
    with (
        serving(interceptors=[TokenCheck()]) as batcher,
        connect(batcher, interceptors=(interceptor for interceptor in [SendToken()])) as client,
    ):
        assert client.send_request(b"x") == answer(b"x")


def test_a_clients_options_may_be_given_in_a_generator(certificates: Certificates) -> None:
    """One that is lost would let the client accept a certificate for the wrong name."""
    options = (("grpc.ssl_target_name_override", name) for name in ["elsewhere.example"])
    with serving(credentials=tls(certificates)) as batcher:
        refused(connect(batcher, credentials=trusting(certificates), options=options), UNAVAILABLE)


def test_a_bad_interceptor_in_an_iterator_is_refused_by_both_ends() -> None:
    with pytest.raises(TypeError, match="interceptors contains 'not one'"):
        create_batcher("repr", 1, 0.0, 0, batch_process_fn=echo, interceptors=iter(["not one"]))
    with pytest.raises(TypeError, match="interceptors contains 'not one'"):
        MukoeBatcherClient("localhost:1", interceptors=iter(["not one"]))


def test_bad_metadata_in_an_iterator_is_refused() -> None:
    with pytest.raises(ValueError, match="metadata contains the key 'Token'"):
        MukoeBatcherClient("localhost:1", metadata=iter([("Token", "right")]))


# ---- unusable credentials ----


def bad_credentials(which: str, certificates: Certificates) -> grpc.ServerCredentials:
    key, certificate = certificates.server
    if which == "the certificate is not PEM":
        return grpc.ssl_server_credentials([(key, b"not a certificate")])
    if which == "the key is not PEM":
        return grpc.ssl_server_credentials([(b"not a key", certificate)])
    if which == "the key does not match":
        return grpc.ssl_server_credentials([(certificates.client.key, certificate)])
    return grpc.ssl_server_credentials([(key, certificate)], b"not certificates", require_client_auth=True)


@pytest.mark.parametrize(
    "which",
    ["the certificate is not PEM", "the key is not PEM", "the key does not match", "the root certificates are not PEM"],
)
def test_start_raises_value_error_for_unusable_credentials_and_leaves_nothing_behind(
    which: str, certificates: Certificates
) -> None:
    batcher = create_batcher(
        "repr",
        1,
        0.0,
        0,
        batch_process_fn=echo,
        host="127.0.0.1",
        credentials=bad_credentials(which, certificates),
    )
    threads = threading.active_count()
    for _ in range(2):
        with pytest.raises(ValueError, match=r"^credentials is <grpc.*the certificate, the key or the root"):
            batcher.start()
    assert not batcher.is_server_ready()
    assert threading.active_count() == threads
    batcher.shutdown()


def test_a_port_in_use_is_a_bind_error_with_credentials_as_well(certificates: Certificates) -> None:
    with serving() as other, pytest.raises(OSError, match=r"cannot listen on .*: Address already in use"):
        create_batcher(
            "repr", 1, 0.0, other.port, batch_process_fn=echo, host="127.0.0.1", credentials=tls(certificates)
        ).start()


# ---- plaintext ----


@pytest.mark.parametrize(
    ("host", "is_secured", "warnings"),
    [("0.0.0.0", False, 1), ("0.0.0.0", True, 0), ("127.0.0.1", False, 0), ("localhost", False, 0)],
)
def test_start_logs_one_warning_if_other_machines_can_reach_a_plaintext_batcher(
    host: str, is_secured: bool, warnings: int, certificates: Certificates, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING), serving(host=host, credentials=tls(certificates) if is_secured else None):
        pass
    messages = [record.getMessage() for record in caplog.records if record.name == "grpc_batcher"]
    assert len(messages) == warnings
    assert all("in plaintext, to whoever can reach it" in message for message in messages)


# ---- the examples ----


@pytest.mark.parametrize("name", ["tls.py", "mutual_tls.py", "token_check.py"])
def test_the_security_examples_run_and_print_what_their_comments_say(name: str, tmp_path: Path) -> None:
    pytest.importorskip("trustme")
    text = (EXAMPLES / name).read_text()
    expected = re.findall(r"^ *print\(.*\)  # (.*)$", text, re.MULTILINE)
    assert run_program(tmp_path, text) == expected
    assert len(expected) == 2
