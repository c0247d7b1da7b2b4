"""Other forms of a trained model."""
