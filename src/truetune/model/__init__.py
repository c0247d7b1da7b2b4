"""The only place that loads or saves weights: model and tokenizer bound together."""
