"""The embedded engine: a library that loads an engine directory and answers requests."""
