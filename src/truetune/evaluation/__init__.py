"""What a model does on rows, counted: replies, matches, loss, and what tells two models apart."""
