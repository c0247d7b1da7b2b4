"""Through which stages a model goes on its way to a server, and the first one that changes it."""
