"""Clients of model servers: llama.cpp in a child process, or any address."""
