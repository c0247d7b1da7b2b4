"""What a server makes of messages: llama.cpp in a child process, or an address."""
