"""Audit other libraries' trainers in place, without changing them."""
