"""Build the shipped base: a seed -> corpus, tokenizer, weights and model card.

Nothing that trains or asks the base needs this; `truetune lab pretrain` runs it.
"""
