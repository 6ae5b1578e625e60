"""TLS: callers check the server's certificate, and nobody in between can read or change the traffic.

The certificates are generated here. In production they are files from your own certificate authority.
"""

from __future__ import annotations

from grpc_batcher import MukoeBatcherClient, RequestError, create_batcher

import grpc
import trustme

authority = trustme.CA()
certificate = authority.issue_cert("localhost")  # the name that callers connect to
key, chain = certificate.private_key_pem.bytes(), certificate.cert_chain_pems[0].bytes()

with create_batcher(
    "repr",
    batch_size=16,
    batch_timeout_s=0.005,
    port=0,
    batch_process_fn=lambda requests: [({"result": data}, 0) for data in requests],
    credentials=grpc.ssl_server_credentials([(key, chain)]),
) as batcher:
    address = f"localhost:{batcher.port}"

    credentials = grpc.ssl_channel_credentials(root_certificates=authority.cert_pem.bytes())
    with MukoeBatcherClient(address, credentials=credentials) as client:
        print(client.send_request(b"hi"))  # ({'result': b'hi'}, 0)

    with MukoeBatcherClient(address) as client:  # in plaintext
        try:
            client.send_request(b"hi")
        except RequestError as error:
            print(error.code().name)  # UNAVAILABLE
