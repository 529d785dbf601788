"""`moelocal show`: what a person wants to know of one model, here or in the catalog."""

from __future__ import annotations

import json
import math
import re
import shlex
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from moelocal.cli import options as opt
from moelocal.errors import OutOfMemory
from moelocal.units import format_bytes, format_count

if TYPE_CHECKING:
    from pathlib import Path

    from moelocal.machine.hardware import Machine
    from moelocal.model.catalog import Entry
    from moelocal.model.facts import ModelFacts
    from moelocal.model.header import GGUFHeader

_ROLES = {
    "attention": "attention",
    "dense_ffn": "dense layers",
    "shared_expert": "shared experts",
    "routed_expert": "routed experts",
    "output": "output",
    "embedding": "embedding",
}
_REST = "routers, norms"
_TOOLS = re.compile(r"\btools\b")


class RoleRow(NamedTuple):
    """The weights of one role: bytes, bits per weight, and bytes by type."""

    name: str
    n_bytes: int
    bits: float
    types: str
    by_type: dict[str, int]


class Template(NamedTuple):
    """What a chat template offers."""

    is_there: bool
    reasoning: bool
    tools: bool


class Card(NamedTuple):
    """What is shown of a model."""

    title: str
    lines: tuple[tuple[str, str], ...]
    roles: tuple[RoleRow, ...]
    verdict: str


class _Subject(NamedTuple):
    """The model in question; without a `path` it is on the hub, or known from the catalog alone."""

    reference: str
    path: Path | None
    header: GGUFHeader
    facts: ModelFacts
    entry: Entry | None

    @property
    def is_sketch(self) -> bool:
        """Whether the header is the catalog's, without a vocabulary and a template."""
        return self.path is None and "tokenizer.ggml.model" not in self.header.metadata

    @property
    def licence(self) -> str:
        for key in ("general.license", "general.license.name"):
            value = self.header.metadata.get(key)
            if isinstance(value, str) and value.strip() and value != "other":
                return value.strip()[:80]
        return self.entry.licence if self.entry else ""

    @property
    def n_shared(self) -> int:
        """Shared experts: as the header counts them, at least one where there are weights of one."""
        count = self.header.metadata.get(f"{self.facts.arch}.expert_shared_count")
        there = any(layer.shared_expert_bytes for layer in self.facts.layers)
        return max(1, count if isinstance(count, int) else 0) if there else 0

    @property
    def template(self) -> Template | None:
        """None: the catalog does not know."""
        if self.is_sketch:
            return None
        from moelocal.engine.reasoning import FORMATS

        source = self.header.metadata.get("tokenizer.chat_template")
        text = source if isinstance(source, str) else ""
        reasoning = any(sign in text for row in FORMATS for sign in row.signs)
        return Template(bool(text), reasoning, bool(_TOOLS.search(text)))


def show(model: opt.Model, as_json: opt.Json = False) -> None:
    """Show what a model is, and what it would do here."""
    from moelocal.cli.listing import here

    subject = _subject(model)
    roles = tuple(_role_rows(subject.header, bool(subject.facts.tied_output_bytes)))
    machine = here()
    if as_json:
        print(json.dumps(_as_document(subject, roles, machine)))
        return
    from moelocal.cli.render_models import show_card

    verdict, _ = _verdict(subject, machine)
    title = subject.facts.name
    show_card(Card(title, tuple(_lines(subject)), roles, verdict), sys.stdout)


def _subject(reference: str) -> _Subject:
    """The model here, else that on the hub, else what the catalog knows.

    Raises:
        MoelocalError: there is no such model, or no way to look.
    """
    from moelocal.cli.plan import header_of
    from moelocal.model.facts import read_facts

    header, path = header_of(reference)
    return _Subject(reference, path, header, read_facts(header), _entry_of(reference, path))


def _entry_of(reference: str, path: Path | None) -> Entry | None:
    """The catalog's entry for a model, by its name or its repository."""
    from moelocal.model.catalog import entries
    from moelocal.paths import user_path

    is_file = path is not None and path == user_path(reference)  # of whatever name
    name = "" if is_file else reference.partition(":")[0].lower()
    folders = {part.lower() for part in path.parts} if path else set()
    for entry in entries():
        if name in (entry.name, entry.repo.lower()) or f"models--{entry.repo.replace('/', '--')}".lower() in folders:
            return entry
    return None


def _role_rows(header: GGUFHeader, is_tied: bool) -> Iterator[RoleRow]:
    """Size and types of the weights by what they are for; roles without weights are left out. `is_tied`: the embedding
    is the output too."""
    from moelocal.model.ggml_types import GGML_TYPES
    from moelocal.model.roles import tensor_role

    held: dict[str, dict[str, int]] = {}
    counts: dict[str, int] = {}
    for tensor in header.tensors:
        name = _REST if "norm" in tensor.name else _ROLES.get(tensor_role(tensor.name)[1], _REST)
        by_type = held.setdefault(name, {})
        kind = GGML_TYPES[tensor.ggml_type].name
        by_type[kind] = by_type.get(kind, 0) + tensor.n_bytes
        counts[name] = counts.get(name, 0) + math.prod(tensor.shape)
    for name in (*_ROLES.values(), _REST):
        if name in held:
            n_bytes = sum(held[name].values())
            order = sorted(held[name].items(), key=lambda pair: -pair[1])
            types = ", ".join(f"{kind} {_share(part, n_bytes)}".strip() for kind, part in order)
            shown = "embedding, output" if name == "embedding" and is_tied else name
            yield RoleRow(shown, n_bytes, 8 * n_bytes / counts[name], types, dict(order))


def _share(part: int, whole: int) -> str:
    """A type's share of a role's bytes; '' for all of it, and for next to nothing."""
    percent = round(100 * part / whole)
    return "" if percent == 100 else f"{percent} %" if percent else "< 1 %"


def _lines(subject: _Subject) -> Iterator[tuple[str, str]]:
    facts, entry = subject.facts, subject.entry
    yield "Architecture", f"{facts.arch}, {len(facts.layers)} layers"
    if facts.is_moe:
        shared = f", {subject.n_shared} shared" if subject.n_shared else ""
        yield "Experts", f"{facts.n_experts} a layer, {facts.n_experts_used} used per token{shared}"
        params = f"{format_count(facts.total_params)}, {format_count(facts.active_params)} active per token"
    else:
        yield "Experts", "none: a dense model"
        params = format_count(facts.total_params)
    yield "Parameters", params
    if facts.n_ctx_train:
        yield "Context", f"{facts.n_ctx_train:,} tokens"
    yield "Quantization", facts.quant
    yield "Size", format_bytes(facts.file_bytes) + (", about" if subject.is_sketch else "")
    yield "Licence", subject.licence or "not told by the file"
    if (template := subject.template) is not None:
        offers = [name for name, has in (("reasoning", template.reasoning), ("tools", template.tools)) if has]
        yield (
            "Template",
            ("yes" + (f", with {' and '.join(offers)}" if offers else "")) if template.is_there else "none",
        )
    if entry is not None:
        yield "Good at", entry.good_at
        yield "Repository", entry.repo
    if subject.path is None:
        yield "File", f"not on this disk; to get it: moelocal pull {shlex.quote(subject.reference)}"
    else:
        n = len(subject.header.shards)
        yield "File", str(subject.path) + (f" and {n - 1} more" if n > 1 else "")


def _verdict(subject: _Subject, machine: Machine) -> tuple[str, dict[str, Any]]:
    """The plan in one line, and as JSON."""
    from moelocal.cli.opening import known
    from moelocal.plan.outcome import outcome_of, sentence
    from moelocal.plan.planner import make_plan
    from moelocal.plan.request import PlanRequest

    history = known(subject.path, subject.facts, machine) if subject.path else None
    try:
        plan = make_plan(subject.facts, machine, PlanRequest(), history)
    except OutOfMemory as error:
        return error.message, {"kind": "too large", "decode_per_s": None, "verdict": error.message}
    text, found = sentence(plan, subject.facts), outcome_of(plan)
    return text, {"kind": found.kind, "decode_per_s": found.decode_per_s, "verdict": text}


def _as_document(subject: _Subject, roles: tuple[RoleRow, ...], machine: Machine) -> dict[str, Any]:
    facts, template = subject.facts, subject.template
    return {
        "model": subject.reference,
        "name": facts.name,
        "path": None if subject.path is None else str(subject.path),
        "files": [] if subject.path is None else list(subject.header.shards),
        "bytes": facts.file_bytes,
        "arch": facts.arch,
        "n_layers": len(facts.layers),
        "n_experts": facts.n_experts,
        "n_experts_used": facts.n_experts_used,
        "n_experts_shared": subject.n_shared,
        "total_params": facts.total_params,
        "active_params": facts.active_params,
        "n_ctx": facts.n_ctx_train,
        "quant": facts.quant,
        "licence": subject.licence or None,
        "template": None if template is None or not template.is_there else _template_json(template),
        "weights": [
            {"role": role.name, "bytes": role.n_bytes, "bits_per_weight": round(role.bits, 3), "types": role.by_type}
            for role in roles
        ],
        "here": _verdict(subject, machine)[1],
    }


def _template_json(template: Template) -> dict[str, bool]:
    return {"reasoning": template.reasoning, "tools": template.tools}
