"""A caller for compose.yaml: `python caller.py ADDRESS REQUESTS`. It waits for a server that is not up yet."""

from __future__ import annotations

import os
import sys
import time

from grpc_batcher import MukoeBatcherClient, RequestError


def main() -> None:
    address, requests = sys.argv[1], int(sys.argv[2])
    data = os.uname().nodename.encode()
    answered = in_batches = 0
    with MukoeBatcherClient(address) as client:
        while answered < requests:
            try:
                answer, in_batch = client.send_request(data, timeout_s=10)
            except RequestError as error:
                print(f"trying again in a second: {error}", flush=True)
                time.sleep(1)
                continue
            assert answer == {"result": data.upper()}, answer
            answered += 1
            in_batches += in_batch
    print(f"{answered} requests answered, in batches of {in_batches / max(answered, 1):.2f} on average", flush=True)


if __name__ == "__main__":
    main()
