"""The rows. Each module has a TITLE and an `open_row`, which starts what it needs and returns the cells to measure."""
