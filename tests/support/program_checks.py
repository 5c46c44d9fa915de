"""Compares what `analyze` and `with_max_logits` find with what a family of programs has."""

import jax
import jax.numpy as jnp
import numpy as np

import muonclip_jax as mc


def described(role, axes):
    """Writes a role as the families do."""
    sides = ""
    if role.dimension_numbers is not None:
        pairs = ((s,) if isinstance(s, int) else s for s in role.dimension_numbers)
        sides = ">".join("".join(axes[d] for d in side) for side in pairs)
    return role.optimizer, sides, role.reason


def wrong_roles(family, analysis):
    """Lists the parameters whose role is not the one of the family."""
    wrong = []
    for path, text in family.spec.items():
        axes, expected = text.split(":")
        optimizer, sides, reason = described(analysis.roles[path], axes)
        if ">" in expected and " " not in expected:
            right = (optimizer, sides) == ("muon", expected)
        else:
            side, _, why = expected.partition(" ") if ">" in expected else ("", "", expected)
            wanted = "unknown" if why.startswith("?") else "adamw"
            why = why.removeprefix("?")
            right = optimizer == wanted and reason.startswith(why) and side in ("", sides)
        if not right:
            wrong.append(f"{path} {axes}: {optimizer} {sides} ({reason}), expected {expected}")
    return wrong


def wrong_sites(family, analysis):
    """Lists the attention layers that do not belong to the family."""
    found = {site.path: site for site in analysis.attention}
    wrong = [f"{path or '(root)'}: in one of both" for path in found.keys() ^ family.sites.keys()]
    for path in found.keys() & family.sites.keys():
        site, (heads, kv_heads, head_dim, layers, *notes) = found[path], family.sites[path]
        got = site.num_heads, site.num_kv_heads, site.head_dim, site.num_layers
        flags = {name: getattr(site, name) for name in ("qk_norm", "soft_cap", "sink", "faults")}
        marks = {name for name, there in flags.items() if there}
        if got != (heads, kv_heads, head_dim, layers) or marks != {*notes}:
            wrong.append(f"{path or '(root)'}: {site}, expected {family.sites[path]}")
    return wrong


def recorded(family):
    """Records the logits of a model in float64, and reduces them to `[layers * heads]` by path."""

    @jax.jit
    def run(params, *args):
        found = {}

        def tap(path, logits):
            assert logits.dtype == jnp.float64
            top = jnp.max(logits, axis=(0, -2, -1)).reshape(-1)
            found.setdefault(path, []).append(top)

        family.fn(params, *args, tap=tap)
        return {path: jnp.concatenate(tops) for path, tops in found.items()}

    def wide(a):
        return np.float64(a) if np.asarray(a).dtype.kind == "f" else a

    with jax.enable_x64(True):
        return run(*jax.tree.map(wide, (family.params(), *family.args)))


def check_max_logits(family):
    """Compares max logits with float64, and loss and gradients with the plain function."""
    params = family.params()
    count = sum(site[3] for site in family.sites.values())
    fn = mc.with_max_logits(family.fn, expect=count)
    (loss, stats), grads = jax.jit(jax.value_and_grad(fn, has_aux=True))(params, *family.args)
    plain = jax.jit(jax.value_and_grad(family.fn))(params, *family.args)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), (loss, grads), plain))
    expected = recorded(family)
    assert expected.keys() == family.sites.keys()
    for path, (heads, _, _, num_layers, *_) in family.sites.items():
        x = _by_path(stats, path)
        assert x.dtype == jnp.float32
        assert x.shape[-1] == heads
        stack = x.shape[:1] if num_layers > 1 else ()
        x = np.asarray(x).reshape(*stack, -1, heads).max(-2).reshape(-1)
        np.testing.assert_allclose(x, expected[path], rtol=2e-5, atol=1e-5)


def _by_path(stats, path):
    for part in path.split("/") if path else ():
        stats = stats[part]
    return stats["max_logits"]
