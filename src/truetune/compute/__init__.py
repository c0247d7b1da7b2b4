"""Examples to batches to loss: pure functions of model and batch, used by all who compute."""
