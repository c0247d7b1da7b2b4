"""Export a trained model to other formats."""
