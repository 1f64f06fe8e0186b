"""What is checked before a release: what is shipped installs and works, and old and new dependencies do."""
