"""Replicas of a batcher on Ray: everything behind `grpc_batcher.ray`."""
