"""What a cache of experts would miss, by which experts it keeps: the choices of real routers, played to each policy.

- LRU: the least recently used expert leaves. What the kernel's page cache does roughly, and moelocal exactly.
- profile + LRU: half of the room for the profile's most used experts, for good; LRU in the rest.
- profile: the profile's most used experts, for good. Others are read whenever they are chosen.
- LRFU h: each use counts half of one h tokens later; the expert with the least leaves. Longer h: nearer to counting all
  uses, shorter: nearer to LRU. (Lee et al., 2001, "LRFU: a spectrum of policies ...".)
- LRFU h + profile: the same, beginning with the profile's counts, as if it had just been seen.
- best: the expert that is wanted again last leaves (Belady, 1966). Nobody can know it; the bound.

The text is the built-in passages: the profile is made from the first half of each and the second halves are played;
`unlike`: from half of the passages, and the others are played. With `--random`, for files of random weights: random
tokens, as in `bench_residency.py`. Experts of all layers share the room, as in moelocal. Shown: choices that miss, as a
ratio to LRU's; for LRU the share of all choices.

usage: python scripts/cache_policies.py FILE.gguf ... [--random] [--held 35,50,65,80] [--horizons 16,64,256]
"""

from __future__ import annotations

import argparse
import heapq
import math
import random
import sys
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from moelocal.engine.nodes import route
from moelocal.engine.session import load
from moelocal.engine.watch import Watch
from moelocal.measure.routing import built_in
from moelocal.model.facts import read_facts
from moelocal.model.header import read_header
from moelocal.plan.planner import Plan

Key = tuple[int, int]  # layer, expert
Token = list[tuple[Key, ...]]  # the choices of each layer
N_CTX, N_RANDOM = 512, 500


def traces(path: Path, is_random: bool) -> dict[str, tuple[list[Token], list[Token]]]:
    """By name: what the profile saw, and what is played."""
    header, watch = read_header(path), Watch()
    plan = Plan(N_CTX, "f16", N_CTX, 2, 0, False, "mmap", n_outputs=N_CTX)
    with load([path], header, plan, watch=watch) as session:

        def run(tokens: Sequence[int]) -> list[Token]:
            done: list[Token] = []
            for at in range(0, len(tokens), N_CTX):
                for n in route(session, watch, tokens[at : at + N_CTX]):
                    done += tokens_of(watch, min(n, N_CTX))
            return done

        if is_random:
            noise = random.Random(1)
            n_vocab = len(header.metadata["tokenizer.ggml.tokens"])
            tokens = [noise.randrange(n_vocab) for _ in range(2 * N_RANDOM)]
            return {"random tokens": (run(tokens[:N_RANDOM]), run(tokens[N_RANDOM:]))}
        texts = [run(session.tokenize(one.text, special=False)) for one in built_in()]
    half = len(texts) // 2
    return {
        "text": (joined(text[: len(text) // 2] for text in texts), joined(text[len(text) // 2 :] for text in texts)),
        "text, unlike": (joined(texts[:half]), joined(texts[half:])),
    }


def joined(parts: Iterable[list[Token]]) -> list[Token]:
    return [token for part in parts for token in part]


def tokens_of(watch: Watch, n_tokens: int) -> list[Token]:
    """The choices of the batch that was routed last."""
    layers = sorted(watch.take().items())
    return [
        [tuple((layer, one.experts[at]) for at in range(i * one.n_used, (i + 1) * one.n_used)) for layer, one in layers]
        for i in range(n_tokens)
    ]


def lru(played: Sequence[Token], n_slots: int, pinned: frozenset[Key] = frozenset()) -> int:
    """Choices that miss. `pinned` take slots, and stay."""
    held: OrderedDict[Key, None] = OrderedDict()
    missed = 0
    for token in played:
        for keys in token:
            for key in keys:
                if key in held:
                    held.move_to_end(key)
                elif key not in pinned:
                    missed += 1
                    held[key] = None
            while held and len(held) + len(pinned) > n_slots:
                held.popitem(last=False)
    return missed


def ranked(
    played: Sequence[Token], n_slots: int, rank: Callable[[Key, int, int], float], first: dict[Key, float]
) -> int:
    """Choices that miss when the held expert with the lowest rank leaves. `rank` gives that of a key that is used, from
    the time in tokens and its place in all of `played`; `first`: ranks before."""
    ranks: dict[Key, float] = dict(first)
    held: set[Key] = set()
    heap: list[tuple[float, Key]] = []
    missed = place = 0
    for now, token in enumerate(played):
        for keys in token:
            for key in keys:
                ranks[key] = rank(key, now, place)
                place += 1
                missed += key not in held
                held.add(key)
                heapq.heappush(heap, (ranks[key], key))
            aside = []
            while len(held) > max(n_slots, len(keys)):
                value, key = heapq.heappop(heap)
                if key in keys:  # being computed
                    aside.append((value, key))
                elif key in held and ranks[key] == value:
                    held.remove(key)
            for one in aside:
                heapq.heappush(heap, one)
    return missed


def lrfu(played: Sequence[Token], n_slots: int, horizon: int, first: dict[Key, float]) -> int:
    """Ranks are log2 of the sum of 2 ** (time / horizon) over all uses: their order does not change by waiting."""
    ranks = dict(first)

    def rank(key: Key, now: int, _: int) -> float:
        new = now / horizon
        old = ranks.get(key)
        ranks[key] = new if old is None else max(old, new) + math.log2(1 + 2.0 ** -abs(old - new))
        return ranks[key]

    return ranked(played, n_slots, rank, first)


def best(played: Sequence[Token], n_slots: int) -> int:
    """Belady's: ranked by the next use, the sooner the higher."""
    flat = [key for token in played for keys in token for key in keys]
    after: list[float] = [0.0] * len(flat)
    last: dict[Key, int] = {}
    for place in reversed(range(len(flat))):
        after[place] = last.get(flat[place], len(flat) + place)
        last[flat[place]] = place
    return ranked(played, n_slots, lambda _key, _now, place: -after[place], {})


def row(
    seen: Sequence[Token], played: Sequence[Token], held: float, horizons: Sequence[int], n_experts: int
) -> list[str]:
    """Misses of each policy, as shown."""
    counts = Counter(key for token in seen for keys in token for key in keys)
    hottest = [key for key, _ in counts.most_common()]
    n_slots = int(n_experts * held)
    n_all = sum(len(keys) for token in played for keys in token)
    base, kept = lru(played, n_slots), frozenset(hottest[:n_slots])
    misses = [
        lru(played, n_slots, frozenset(hottest[: n_slots // 2])),
        sum(key not in kept for token in played for keys in token for key in keys),
    ]
    for horizon in horizons:
        steady = horizon / len(seen) / math.log(2)  # uses that count, of a stream that goes on like this
        first = {key: math.log2(n * steady) for key, n in counts.items()}
        misses += [lrfu(played, n_slots, horizon, {}), lrfu(played, n_slots, horizon, first)]
    misses.append(best(played, n_slots))
    return [f"{base / n_all:.1%}", *(f"{one / max(1, base):.2f}" for one in misses)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE.gguf")
    parser.add_argument("--random", action="store_true", help="random tokens")
    parser.add_argument("--held", default="35,50,65,80", help="experts that RAM holds, percent of all")
    parser.add_argument("--horizons", default="16,64,256", help="of LRFU, tokens")
    args = parser.parse_args()
    horizons = [int(one) for one in args.horizons.split(",")]
    names = [name for h in horizons for name in (f"LRFU {h}", f"LRFU {h} + profile")]
    columns = ("file", "played", "held", "LRU misses", "profile + LRU", "profile", *names, "best")
    print(f"| {' | '.join(columns)} |\n|---|---|{'---:|' * (len(columns) - 2)}")
    for path in args.files:
        facts = read_facts(read_header(path))
        n_experts = sum(layer.n_experts for layer in facts.layers)
        for name, (seen, played) in traces(path, args.random).items():
            for held in args.held.split(","):
                cells = row(seen, played, int(held) / 100, horizons, n_experts)
                print(f"| {path.stem} | {name}, {len(played)} tokens | {held} % | {' | '.join(cells)} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
