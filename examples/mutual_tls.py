"""Mutual TLS: the server also checks its callers' certificates, and serves only those signed by its authority.

The certificates are generated here. In production they are files from your own certificate authority.
"""

from __future__ import annotations

from grpc_batcher import MukoeBatcherClient, RequestError, create_batcher

import grpc
import trustme

authority = trustme.CA()
roots = authority.cert_pem.bytes()


def key_and_chain(name: str) -> tuple[bytes, bytes]:
    certificate = authority.issue_cert(name)
    return certificate.private_key_pem.bytes(), certificate.cert_chain_pems[0].bytes()


with create_batcher(
    "repr",
    batch_size=16,
    batch_timeout_s=0.005,
    port=0,
    batch_process_fn=lambda requests: [({"result": data}, 0) for data in requests],
    credentials=grpc.ssl_server_credentials(
        [key_and_chain("localhost")], root_certificates=roots, require_client_auth=True
    ),
) as batcher:
    address = f"localhost:{batcher.port}"

    credentials = grpc.ssl_channel_credentials(roots, *key_and_chain("actor-1.example"))
    with MukoeBatcherClient(address, credentials=credentials) as client:
        print(client.send_request(b"hi"))  # ({'result': b'hi'}, 0)

    with MukoeBatcherClient(address, credentials=grpc.ssl_channel_credentials(roots)) as client:
        try:
            client.send_request(b"hi")
        except RequestError as error:
            print(error.code().name)  # UNAVAILABLE
