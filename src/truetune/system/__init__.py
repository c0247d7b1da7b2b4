"""The operating system: child processes, one writer a folder, and signals."""
