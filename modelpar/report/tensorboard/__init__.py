"""Shows runs in TensorBoard: `writer` writes a run's event file, `view` starts the server."""
