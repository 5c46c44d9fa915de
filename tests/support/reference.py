"""Float64 NumPy references of the optimizer half, written from the papers alone."""

import numpy as np

JORDAN = (3.4445, -4.7750, 2.0315)


def polynomial(rows, s):
    for a, b, c in rows:
        s = a * s + b * s**3 + c * s**5
    return s


def _wide(x):
    x = np.asarray(x)
    return x.astype(np.complex128 if np.iscomplexobj(x) else np.float64)


def newton_schulz(x, rows, preconditioning="frobenius"):
    """Takes the singular values of the normalized matrix through the polynomials."""
    x = _wide(x)
    u, s, vh = np.linalg.svd(x, full_matrices=False)
    if preconditioning == "frobenius":
        s = s / np.sqrt(np.sum(s**2))
    elif preconditioning == "spectral":
        s = s / s[0]
    elif preconditioning == "schatten":
        s = s / np.sum(s**4) ** 0.25
    elif preconditioning == "aol":
        short = x if x.shape[0] <= x.shape[1] else x.T
        row = 1 / np.sqrt(np.abs(short @ short.conj().T).sum(axis=1, keepdims=True))
        u, s, vh = np.linalg.svd(row * short, full_matrices=False)
        y = (u * polynomial(rows, s)) @ vh
        return y if short is x else y.T
    return (u * polynomial(rows, s)) @ vh


def muon(
    params,
    gradients,
    *,
    learning_rate,
    beta=0.95,
    nesterov: str | None = "optax",
    rows=(JORDAN,) * 5,
    weight_decay=0.0,
    consistent_rms=None,
    adaptive=False,
    preconditioning="frobenius",
):
    """Trains one matrix n_in x n_out; returns it after each gradient.

    `nesterov`: None, "optax" (bias-corrected, optax/contrib/_muon.py) or "plain" (Keller Jordan).
    """
    w = _wide(params)
    m = np.zeros_like(w)
    trajectory = []
    for t, g in enumerate(gradients, start=1):
        g = _wide(g)
        m = beta * m + (1 - beta) * g
        if nesterov == "optax":
            d = beta * m / (1 - beta ** (t + 1)) + (1 - beta) * g / (1 - beta**t)
        elif nesterov == "plain":
            d = (1 - beta) * g + beta * m
        else:
            d = m / (1 - beta**t)
        o = newton_schulz(d, rows, preconditioning) if np.any(d) else np.zeros_like(d)
        if adaptive:
            o = o * np.sum(d.conj() * o)
        n_in, n_out = w.shape
        if consistent_rms is None:
            scale = np.sqrt(max(1.0, n_out / n_in))
        else:
            scale = consistent_rms * np.sqrt(max(n_in, n_out))
        w = w - learning_rate * (scale * o + weight_decay * w)
        trajectory.append(w)
    return trajectory


def relative_error(got, expected):
    """Frobenius norm of the difference, relative to the norm of the expected."""
    got, expected = _wide(got), _wide(expected)
    return np.linalg.norm(got - expected) / np.linalg.norm(expected)


def adamw(
    params,
    gradients,
    *,
    learning_rate,
    b1=0.9,
    b2=0.999,
    eps=1e-8,
    weight_decay=0.0,
    nesterov=False,
):
    """Trains one leaf with AdamW, Loshchilov & Hutter 2019; returns it after each gradient."""
    w = _wide(params)
    m, v = np.zeros_like(w), np.zeros_like(w)
    trajectory = []
    for t, g in enumerate(map(_wide, gradients), start=1):
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
        d = m / (1 - b1**t)
        if nesterov:
            d = b1 * m / (1 - b1 ** (t + 1)) + (1 - b1) * g / (1 - b1**t)
        w = w - learning_rate * (d / (np.sqrt(v / (1 - b2**t)) + eps) + weight_decay * w)
        trajectory.append(w)
    return trajectory
