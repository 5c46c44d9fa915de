"""Several matrices on the middle axis of a kernel: gates of a cell, gate and up of an MLP."""

import math

from muonclip_jax._muon.roles import names
from muonclip_jax._muon.roles.decision import Decision, RoleSettings
from muonclip_jax._muon.roles.evidence import Evidence
from muonclip_jax._muon.roles.kernels import heads_name, inputs_near, numbers_of
from muonclip_jax._muon.roles.modules import Leaf, Shape, is_tiny


def gates_of_a_cell(leaf: Leaf, evidence: Evidence, settings: RoleSettings) -> Decision | None:
    """(inputs, gates, outputs) of a recurrent cell: a matrix for each of three or four gates."""
    del settings
    stack, shape = evidence.layer_of(leaf)
    is_cell = len(shape) == 3 and shape[1] in (3, 4) and leaf.has(names.CELL)
    if not is_cell or min(shape[0], shape[2]) <= shape[1]:
        return None
    return Decision(numbers_of(leaf, stack, (0,), (2,)), f"{shape[1]} gates of a recurrent cell")


def gated_pair(leaf: Leaf, evidence: Evidence, settings: RoleSettings) -> Decision | None:
    """(inputs, 2, outputs): gate and up in one parameter."""
    del settings
    name = leaf.name
    stack, shape = evidence.layer_of(leaf)
    is_pair = len(shape) == 3 and shape[1] == 2 and names.matches(names.GATED_PAIR, name)
    if not is_pair or (not stack.known and shape[0] < 8):
        return None
    return Decision(numbers_of(leaf, stack, (0,), (2,)), f"gate and up '{name}'")


def few_outputs(leaf: Leaf, evidence: Evidence, sizes: Shape) -> tuple[bool, str]:
    """Decides whether (inputs, few, *outputs) is a matrix for each of the few, or one of heads.

    Args:
      leaf: A kernel.
      evidence: See `Evidence`.
      sizes: inputs, few, *outputs.

    Returns:
      Whether names or the kernel beside it, which has these outputs as inputs, show a matrix for
      each; a doubt, if nothing shows it.
    """
    n_in, few, *n_out = sizes
    is_few = few == 2 if len(n_out) == 1 else few in (2, 3)
    is_short = is_tiny(few, math.prod(n_out)) and is_tiny(few, n_in)
    layers = [evidence.layer_of(x)[1] for x in evidence.beside(leaf)]
    queries = [evidence.layer_of(x)[1] for x in inputs_near(leaf.module, evidence)]
    if sizes in queries or (few, *n_out, n_in) in layers:
        return False, ""  # heads, as of the gate of AlphaFold
    is_cell = few in (3, 4) and leaf.has(names.CELL)
    is_pair = few == 2 and names.matches(names.GATED_PAIR, leaf.name)
    if len(n_out) == 1 and (is_cell or is_pair):
        return True, ""
    if not is_short or few < 2 or heads_name(leaf, evidence) or leaf.is_lora:
        return False, ""
    back = {(*n_out, n_in), (math.prod(n_out), n_in)}
    if is_few and any(layer[-len(b) :] == b for b in back for layer in layers):
        return True, ""
    return False, f"nothing shows whether these are {few} matrices or {few} heads"


def few_between(leaf: Leaf, evidence: Evidence, settings: RoleSettings) -> Decision | None:
    """(inputs, few, outputs): a matrix for each of the few, as the last two axes are tiny.

    (outputs, inputs) beside (inputs, 2, outputs) shows gate and up; without it, this is doubted.
    """
    stack, shape = evidence.layer_of(leaf)
    if len(shape) == 4 and few_outputs(leaf, evidence, shape)[0]:
        numbers = numbers_of(leaf, stack, (0,), (2, 3))
        return Decision(numbers, f"{shape[1]} in one, as the matrix beside it shows")
    if len(shape) < 3 or leaf.is_lora or (len(shape) == 3 and leaf.has(names.EXPERTS)):
        return None
    *experts, n_first, few, n_last = shape
    is_between = 1 < few < n_first and is_tiny(few, n_last) and is_tiny(few, n_first)
    if not is_between or (len(shape) == 3 and evidence.shared_axis(leaf)):
        return None
    layers = (evidence.layer_of(x)[1] for x in evidence.beside(leaf))
    shown = few == 2 and (*experts, n_last, n_first) in layers
    doubt = "" if shown else f"nothing shows whether these are {few} matrices or {few} heads"
    reason = "gate and up, as the matrix beside it shows" if shown else f"{few} matrices"
    first, last = len(shape) - 3, len(shape) - 1
    sides = ((last,), (first,)) if settings.outputs_first else ((first,), (last,))
    return Decision(numbers_of(leaf, stack, *sides), reason, doubt)
