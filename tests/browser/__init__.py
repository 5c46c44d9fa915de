"""The site in a browser: `make browser`."""
