"""Trains with MaxText: `python -m muonclip_jax.integrations.maxtext base.yml key=value …`."""

from muonclip_jax.integrations.maxtext import main

if __name__ == "__main__":
    main()
