"""Programs that use muonclip_jax: two of one page each, and a training program."""
