"""Template, tokenizer, stop set and template arguments as one value; token examples and proof."""
