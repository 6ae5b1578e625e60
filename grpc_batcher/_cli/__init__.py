"""The command line, `grpc-batcher`. Needs the extra `cli`."""
