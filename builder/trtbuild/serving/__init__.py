"""Start a Triton server over a package, talk to it, and check what it says."""
