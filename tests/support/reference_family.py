"""Float64 NumPy references of the Muon family, written from the equations of the papers alone."""

import numpy as np


def _wide(x):
    x = np.asarray(x)
    return x.astype(np.complex128 if np.iscomplexobj(x) else np.float64)


def cautious_decay(u, w, decay):
    """U + λ W where U and W agree in sign."""
    u, w = _wide(u), _wide(w)
    return u + decay * w * ((u.conj() * w).real >= 0)


def normuon(updates, b2=0.95, eps=1e-10):
    """Takes matrices n_in x n_out in order; returns what each becomes."""
    v, found = 0.0, []
    for o in map(_wide, updates):
        v = b2 * v + (1 - b2) * np.mean(np.abs(o) ** 2, axis=0)
        scaled = o / np.sqrt(v + eps)
        norm = np.linalg.norm(scaled)
        found.append(scaled * (np.linalg.norm(o) / norm if norm else 0.0))
    return found


def equilibrated(x, by):
    """Gives the entries of each output (a column) or input (a row) the norm 1; 0 stays 0."""
    x = _wide(x)
    norm = np.sqrt(np.sum(np.abs(x) ** 2, axis={"outputs": 0, "inputs": 1}[by], keepdims=True))
    return np.divide(x, norm, out=np.zeros_like(x), where=norm > 0)


def renormalized(x):
    """X with the Frobenius norm √min(n_in, n_out)."""
    x = _wide(x)
    return x * np.sqrt(min(x.shape)) / np.linalg.norm(x)


def sinkhorn(gradients, beta=0.95, tau=1e-3):
    """Algorithm 1 of the DeepSeek-V4.1 report, for tables tokens x features in order."""
    m, found = 0.0, []
    for g in map(_wide, gradients):
        m = beta * m + (1 - beta) * g
        u = beta * m + (1 - beta) * g
        norms = [np.linalg.norm(row) for row in u]
        for row, norm in zip(u, norms, strict=True):
            if norm <= tau * np.mean(norms):
                row[:] = 0
        for k in range(11):
            for vector in u if k % 2 == 0 else u.T:
                vector /= np.linalg.norm(vector) + 1e-20
        found.append(np.sqrt(u.shape[1]) * u)
    return found
