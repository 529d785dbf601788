"""What each layer of a compute graph takes and frees, step by step in llama.cpp's order. Pure.

A step that llama.cpp does in place of its operand takes nothing; nothing is done in place of a view.

Source: llama.cpp 0c1e57098, src/llama-graph.cpp (build_qkv, build_attn_mha, build_moe_ffn), src/models/*.cpp,
ggml/src/ggml-alloc.c (ggml_op_can_inplace).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from moelocal.model.arena import F32, Replay, Tensor
from moelocal.model.graph import AttentionGraph, LayerGraph, RecurrentGraph


class Style(NamedTuple):
    """How attention is computed: without flash attention every query has a score for each of `n_kv` cells; a quantized
    cache holds keys and values that were rotated. `is_windowed`: some of the model's layers attend within a window."""

    n_kv: int
    is_flash: bool
    is_quantized: bool
    is_windowed: bool


def add(replay: Replay, stream: Tensor, addend: Tensor, to_input: bool) -> Tensor:
    """The residual: the sum takes the place of one of the two."""
    kept, left = (stream, addend) if to_input else (addend, stream)
    replay.free(left)
    return kept


def attend(r: Replay, g: AttentionGraph, device: str, style: Style, x: Tensor) -> Tensor:
    """Attention up to its output projection."""
    norm = r.like(x)
    if g.latent:
        return _attend_latent(r, g, g.latent, device, norm)
    q, gates = _project(r, g, device, style, norm)
    result = r.new(device, g.out) if style.is_flash else r.new(device, style.n_kv * g.n_head)
    r.free(q)
    if not style.is_flash:  # the scores; what they weigh; heads side by side again
        scores, weighed = result, r.new(device, g.out)
        r.free(scores)
        result = r.new(device, g.out)
        r.free(weighed)
    if gates:
        opened = r.new(device, g.out)
        r.free(gates, result)
        result = opened
    return result


def _project(r: Replay, g: AttentionGraph, device: str, style: Style, norm: Tensor) -> tuple[Tensor, Tensor | None]:
    """Queries, and the gates of the result where they come with them; keys and values go into the cache.

    Seen as heads a projection is a view, and nothing is done to a view in place: hence the second tensors.
    """

    def rotate(tensor: Tensor) -> Tensor:
        return r.replace(tensor) if style.is_quantized else tensor

    if g.is_fused:
        projected = r.new(device, g.q + g.k + g.v)
        r.free(norm)
        q, k = rotate(r.new(device, g.q)), rotate(r.new(device, g.k))
        r.free(k, projected)
        return q, None
    q, gates = r.new(device, g.q), None
    if g.q > g.out:
        gates, q = q, r.new(device, g.out)
    elif g.has_rope or g.is_scaled:
        q = r.replace(q)
    q = rotate(q)
    if style.is_windowed:
        _keys_first(r, g, norm, rotate)
        return q, gates
    v, k = rotate(r.new(device, g.v)), r.new(device, g.k)
    r.free(norm)
    r.free(rotate(r.replace(k) if g.has_rope else k), v)
    return q, gates


def _keys_first(r: Replay, g: AttentionGraph, norm: Tensor, rotate: Callable[[Tensor], Tensor]) -> None:
    """Keys, then values, where some layers attend within a window; elsewhere it is the other way round."""
    projected = r.new(norm.device, g.k)
    if g.values == "keys":
        r.free(norm)
    k = r.new(norm.device, g.k) if g.has_rope else projected
    if g.values == "keys":
        v = r.new(norm.device, g.v)
        r.free(projected)
    else:
        if k is not projected:
            r.free(projected)
        k = rotate(k)
        v = r.new(norm.device, g.v)
        r.free(norm)
        v = r.replace(v) if g.values == "normed" else v
    r.free(k, rotate(v))


def _attend_latent(r: Replay, g: AttentionGraph, latent: tuple[int, int, int], device: str, norm: Tensor) -> Tensor:
    """MLA: queries are brought into the latent space, whose values all heads share."""
    q_rank, rope, rank = latent
    narrow = r.new(device, q_rank)
    q = r.new(device, g.q)
    r.free(narrow)
    absorbed, turned = r.new(device, rank * g.n_head), r.new(device, rope * g.n_head)
    r.free(q)
    queries = r.new(device, (rank + rope) * g.n_head)
    r.free(absorbed, turned)
    both = r.new(device, rank + rope)
    r.free(norm)
    values, turned = r.new(device, rank), r.new(device, rope)
    r.free(both)
    keys = r.new(device, rank + rope)
    r.free(turned, keys, values)
    attended = r.new(device, rank * g.n_head)
    r.free(queries)
    heads = r.new(device, g.out)
    r.free(attended)
    return r.replace(heads)


def recall(r: Replay, g: RecurrentGraph, device: str) -> Tensor:
    """The last tokens of the past, for the convolution."""
    return r.take(device, g.past * F32)


def recur(r: Replay, g: RecurrentGraph, device: str, x: Tensor, history: Tensor | None) -> Tensor:
    """A convolution over a few tokens, then a state that each token changes."""
    norm = r.like(x)
    history = history or recall(r, g, device)
    projected = r.new(device, g.projected)
    if g.keys:  # gated delta net: queries, keys and values are convolved
        window = r.new(device, g.conv, g.past)
        r.free(history, projected)
        state = r.take(device, g.state * F32)
        conv = r.new(device, g.conv)
        r.free(window)
        return _delta_net(r, g, conv, state, norm)
    r.free(norm)
    mixed = None if g.state else r.new(device, g.conv)
    window = r.new(device, g.conv, g.past)
    r.free(history)
    if mixed:
        r.free(mixed)
    conv = r.new(device, g.conv)
    r.free(window)
    if mixed:  # a short convolution, and no more
        r.free(projected)
        return conv
    decay = r.new(device, g.n_heads)
    scan = r.new(device, g.inner, g.state)
    r.free(decay)
    gates = r.new(device, g.inner)
    r.free(projected)
    through = r.new(device, g.inner)
    r.free(conv, scan)
    gated = r.new(device, g.inner)
    r.free(gates, through)
    return r.replace(gated)


def _delta_net(r: Replay, g: RecurrentGraph, conv: Tensor, state: Tensor, norm: Tensor) -> Tensor:
    """Queries and keys are repeated to the values' heads; the result is gated by another projection."""
    device, spread = conv.device, []
    for _ in range(2):
        narrow = r.new(device, g.keys)
        spread.append(r.new(device, g.inner))
        r.free(narrow)
    both = r.new(device, 2 * g.n_heads)
    decay, rate = r.new(device, g.n_heads), r.new(device, g.n_heads)
    r.free(both)
    scan = r.new(device, g.inner, g.state)
    r.free(*spread, conv, decay, rate, state)
    result = r.new(device, g.inner)
    r.free(scan)
    gates = r.new(device, g.inner)
    r.free(norm)
    r.free(r.replace(gates))
    return result


class Router(NamedTuple):
    """Experts in the order of their score, and the weights of the chosen ones."""

    order: Tensor
    weights: Tensor


def ask_router(r: Replay, g: LayerGraph, x: Tensor) -> Router:
    """Scores of all experts, their order, and the chosen ones' weights."""
    device = x.device
    norm = r.like(x) if g.has_router_norm else None
    probs = r.new(device, g.n_experts)
    if norm:
        r.free(norm)
    if g.is_weighed_first:  # chosen by what the weights are made of
        probs, logits = r.new(device, g.n_experts), probs
        order = r.new(device, g.n_experts)
        r.free(logits)
        weights = r.new(device, g.n_used)
        r.free(probs)
        return Router(order, weights)
    biased = r.new(device, g.n_experts) if g.has_probs_bias else None
    scores = biased or probs
    if g.groups[0] > 1:
        scores = _mask_groups(r, g, scores)
        if biased:
            r.free(biased)
    order = r.new(device, g.n_experts)
    if scores is not probs:
        r.free(scores)
    weights = r.new(device, g.n_used)
    r.free(probs)
    if g.weighing != "normed":
        return Router(order, r.replace(weights) if g.weighing == "softmax" else weights)
    total = r.new(device, 1)
    normed = r.new(device, g.n_used)
    r.free(weights, total)
    return Router(order, r.replace(normed) if g.is_scaled else normed)


def _mask_groups(r: Replay, g: LayerGraph, scores: Tensor) -> Tensor:
    """Scores of the experts of those groups whose two best ones are best."""
    device, (n_groups, n_used) = scores.device, g.groups
    order = r.new(device, g.n_experts)
    best = r.new(device, 2 * n_groups)
    r.free(order)
    totals = r.new(device, n_groups)
    r.free(best)
    groups = r.new(device, n_groups)
    r.free(totals)
    kept = r.new(device, g.n_experts // n_groups * n_used)
    masked = r.new(device, g.n_experts)
    r.free(kept, groups)
    return masked


class Route(NamedTuple):
    """Devices of a layer's experts, and where the layer ends: what follows the last weights of the CPU's last layer is
    pulled over to the GPU that goes on, and with it, in this order, everything that the GPU needs (`arrive`: masks).
    `recall`: the next layer's past, gathered before what of this layer nothing has asked for yet; on a GPU it pulls the
    experts' sum over (`is_pulled`)."""

    home: str
    finish: str
    arrive: Callable[[bool], object]
    recall: Callable[[], object]
    is_pulled: bool


def feed_forward(r: Replay, g: LayerGraph, route: Route, x: Tensor, router: Router | None) -> Tensor:
    """Norm, FFN of any kind, and the residual."""
    if g.has_router_norm:
        router = ask_router(r, g, x)
    norm = r.like(x)
    if not g.n_experts or g.before_output == "experts":
        return _end(r, g, route, x, _dense(r, g.dense_ff, norm))
    given = experts(r, g, route.home, norm, router or ask_router(r, g, x))
    is_last = not g.shared_ff and not g.dense_ff
    given = given.move(r, route.finish if is_last or route.is_pulled else x.device)
    route.arrive(False)
    if is_last:
        x = r.move(x, route.finish)
    if x.device == route.finish:
        route.arrive(True)
    routed = add_up(r, g, given)
    route.recall()
    if g.shared_ff:
        routed, x = _share(r, g, route, (x, norm, routed))
    elif g.dense_ff:  # beside the experts, behind a norm of its own
        dense = _dense(r, g.dense_ff, r.like(x))
        r.free(routed)
        routed = dense
    return _end(r, g, route, x, routed)


def _share(r: Replay, g: LayerGraph, route: Route, given: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """The shared experts' part added to what the routed ones gave; that and the residual, where the layer ends."""
    x, norm, routed = given
    shared = _dense(r, g.shared_ff, norm, keep_norm=g.is_shared_gated)
    gate = r.new(x.device, 1) if g.is_shared_gated else None
    if gate:
        r.free(norm)
    if x.device != route.finish:
        if gate:
            gate, shared = r.move(gate, route.finish), r.move(shared, route.finish)
        routed, shared, x = (r.move(tensor, route.finish) for tensor in (routed, shared, x))
        route.arrive(True)
    if gate:
        r.free(gate)
    r.free(shared)
    return routed, x


def _end(r: Replay, g: LayerGraph, route: Route, x: Tensor, out: Tensor) -> Tensor:
    """The residual, where the layer ends."""
    if x.device != route.finish:
        out, x = r.move(out, route.finish), r.move(x, route.finish)
        route.arrive(True)
    return add(r, x, out, g.adds_to_input[1])


def _dense(r: Replay, width: int, norm: Tensor, keep_norm: bool = False) -> Tensor:
    gate, up = r.new(norm.device, width), r.new(norm.device, width)
    if not keep_norm:
        r.free(norm)
    active = r.new(norm.device, width)
    r.free(gate, up)
    out = r.like(norm)
    r.free(active)
    return out


class Given(NamedTuple):
    """What the chosen experts gave for each token; their weights, if they are not yet in it; and what chose them, if
    each expert has a scale to be looked up."""

    down: Tensor
    weights: Tensor | None
    order: Tensor | None

    def move(self, r: Replay, device: str) -> Given:
        """On the device that goes on with them."""
        return Given(r.move(self.down, device), self.weights and r.move(self.weights, device), self.order)


def experts(r: Replay, g: LayerGraph, home: str, norm: Tensor, router: Router) -> Given:
    """The chosen experts on their device."""
    source = norm
    if g.is_weighed_first:
        source = r.new(norm.device, g.n_embd * g.n_used)
        r.free(router.weights)
    there, chosen = r.copy(source, home), r.copy(router.order, home)
    if chosen is not router.order and not g.has_expert_scale:
        r.free(router.order)
    width = g.ff * g.n_used
    opened = [r.new(home, 2 * width)] if g.is_gate_up_fused else [r.new(home, width), r.new(home, width)]
    if there is not source:
        r.free(there)
    if source is not norm:
        r.free(source)
    if not g.shared_ff:
        r.free(norm)
    active = r.new(home, width)
    r.free(*opened)
    down = r.new(home, g.n_embd * g.n_used)
    r.free(active)
    if chosen is not router.order or not g.has_expert_scale:
        r.free(chosen)
    return Given(down, None if g.is_weighed_first else router.weights, router.order if g.has_expert_scale else None)


def add_up(r: Replay, g: LayerGraph, given: Given) -> Tensor:
    """What the experts gave, weighed and added up."""
    if given.order:  # each token's scales, out of all
        scales, found = r.new(given.order.device, g.n_experts), r.new(given.order.device, g.n_used)
        r.free(scales, given.order, found)
    if given.weights:
        r.free(given.weights)
    total = r.new(given.down.device, g.n_embd)
    r.free(given.down)
    return total
