"""Many adapters on one base, each request its own: over HTTP, and as a Python object."""
