"""Trains with MaxText and this package: `python -m muonclip_jax.integrations.maxtext base.yml …`."""

from muonclip_jax.integrations.maxtext import main

if __name__ == "__main__":
    main()
