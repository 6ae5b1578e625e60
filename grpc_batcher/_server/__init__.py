"""The server: everything behind `create_batcher`."""
