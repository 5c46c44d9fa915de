"""The pictures of the documentation. `make figures` draws each, light and dark, to docs/images."""
