"""Find the first stage between training and a server that changes a model."""
