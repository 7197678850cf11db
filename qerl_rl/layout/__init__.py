"""Which part of a tensor each rank of a layout holds."""
