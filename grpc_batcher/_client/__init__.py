"""The caller: everything behind `MukoeBatcherClient`."""
