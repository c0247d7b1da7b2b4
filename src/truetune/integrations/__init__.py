"""Bridges to other people's tools."""
