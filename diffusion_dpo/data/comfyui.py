"""The prompt inside a graph of ComfyUI: followed from the saved image to its sampler, and from there to the text.

The graph is the `prompt` of ComfyUI's own format: {id: {"class_type": ..., "inputs": {name: value or [id, output]}}}.
Custom nodes are thousands. Whatever changes a text in ways that are not known here is named, and nothing is guessed.
"""

from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Any

_TEXTS = ("populated_text", "text", "text_g", "text_l", "clip_l", "clip_g", "t5xxl", "prompt", "user_prompt")
"""Inputs of nodes that encode a text; SDXL, SD 3 and Flux have one for each of their encoders."""
_PLAIN_TEXT = {
    kind: name
    for name, kinds in {
        "value": ("PrimitiveString", "PrimitiveStringMultiline", "PrimitiveNode"),
        "string": ("String", "String Literal", "StringConstant", "StringConstantMultiline", "Simple String"),
        "text": (
            "Text Multiline",
            "Text",
            "Text box",
            "CR Text",
            "ttN text",
            "Text Prompt (JPS)",
            "JWStringMultiline",
        ),
        "prompt": ("CR Prompt Text",),
        "populated_text": ("ImpactWildcardProcessor",),
    }.items()
    for kind in kinds
}
"""Nodes whose output is the text of one of their inputs, as it is."""
_CONCATENATE = "StringConcatenate"
_CONDITIONING = ("conditioning", "conditioning_1", "conditioning_2", "conditioning_to", "conditioning_from")
_SEEDS = ("noise_seed", "seed", "value", "int")
_MODELS = ("ckpt_name", "unet_name", "base_ckpt_name", "model_name")
_SWITCH = "any_0"
"""How the inputs of rgthree's switch are called, of which the first that is connected is passed on."""
_DRAWS = frozenset(("latent_image", "latent", "samples", "seed", "noise_seed", "steps"))
"""Inputs of which a sampler has one, beside its prompts."""
_DEEPEST = 64
"""More nodes in a row are no chain that people make, but a circle."""


class UnknownNode(ValueError):  # noqa: N818 - it names the graph's state
    """The graph does not say the prompt; the message says why in a few words."""


class Graph:
    """A graph as it was run; what is no node of it is passed over."""

    def __init__(self, nodes: Mapping[str, Any]) -> None:
        there = ((name, node) for name, node in nodes.items() if isinstance(node, dict))
        self.nodes: dict[str, dict[str, Any]] = {
            name: node for name, node in there if isinstance(node.get("inputs"), dict)
        }

    @cached_property
    def samplers(self) -> list[str]:
        """The nodes at which the images began: of several samplers in a row, the first."""
        found = [node for node in self.nodes if _is_sampler(self, node)]
        if len(found) < 2:
            return found
        ends = [node for node in self.nodes if "images" in self.inputs(node) and "Save" in self.kind(node)]
        saved = {node for end in ends for node in self.upstream(end)}
        kept = {node for node in found if node in saved} or set(found)
        return [node for node in found if node in kept and kept.isdisjoint(list(self.upstream(node))[1:])]

    def prompt(self) -> str:
        """Return the prompt; raises UnknownNode where the graph does not say it, or says several.

        Of several samplers in a row (a refiner, a second pass, a face detailer), that of the first counts.
        """
        if not self.samplers:
            raise UnknownNode("its ComfyUI graph has no sampler that is known here")
        prompts = {_prompt(self, sampler, "positive").strip() for sampler in self.samplers}
        if len(prompts) > 1:
            raise UnknownNode(f"its ComfyUI graph draws with {len(prompts)} prompts")
        return prompts.pop()

    def settings(self) -> dict[str, Any]:
        """Return what else the graph says of the image, under the names of an origin, with its seed."""
        return _settings(self, self.samplers[0])

    def inputs(self, node: str) -> dict[str, Any]:
        """Return the inputs of a node by name: values, and links to other nodes."""
        found: dict[str, Any] = self.nodes[node]["inputs"]
        return found

    def kind(self, node: str) -> str:
        """Return the class of a node."""
        return str(self.nodes[node].get("class_type"))

    def link(self, node: str, name: str) -> str:
        """Return the node that an input comes from; "" where it is a value or nothing."""
        value = self.inputs(node).get(name)
        if isinstance(value, list) and len(value) == 2 and str(value[0]) in self.nodes:
            return str(value[0])
        return ""

    def upstream(self, node: str) -> Iterator[str]:
        """Yield a node and everything before it, each once."""
        seen, todo = {node}, [node]
        while todo:
            now = todo.pop()
            yield now
            for name in self.inputs(now):
                source = self.link(now, name)
                if source and source not in seen:
                    seen.add(source)
                    todo.append(source)


def _is_sampler(graph: Graph, node: str) -> bool:
    inputs = graph.inputs(node)
    if "guider" in inputs:
        return bool(graph.link(node, "guider"))
    return "positive" in inputs and not isinstance(inputs["positive"], str) and not _DRAWS.isdisjoint(inputs)


# --- the text --------------------------------------------------------------------------------------------------------


def _prompt(graph: Graph, sampler: str, side: str) -> str:
    guider = graph.link(sampler, "guider")
    if not guider:
        return _side(graph, sampler, side)
    if side not in graph.inputs(guider) and graph.link(guider, "conditioning"):  # BasicGuider, without a negative one
        return _conditioned(graph, graph.link(guider, "conditioning"), side, 0) if side == "positive" else ""
    return _side(graph, guider, side)


def _side(graph: Graph, node: str, side: str, depth: int = 0) -> str:
    """Return the text behind an input called positive or negative, which may be a text itself."""
    value = graph.inputs(node).get(side)
    if isinstance(value, str):
        return value
    source = graph.link(node, side)
    if not source:
        raise UnknownNode(f"the ComfyUI node {graph.kind(node)} has no {side} prompt")
    if graph.link(source, "positive") and graph.link(source, "negative"):  # a node that passes both on, in this order
        side = "negative" if graph.inputs(node)[side][1] == 1 else "positive"
    return _conditioned(graph, source, side, depth + 1)


def _conditioned(graph: Graph, node: str, side: str, depth: int) -> str:
    """Return the one text that a conditioning was made from."""
    if depth > _DEEPEST:
        raise UnknownNode("its ComfyUI graph goes round in a circle")
    inputs, kind = graph.inputs(node), graph.kind(node)
    if kind == "ConditioningZeroOut":
        return ""
    if side in inputs:
        return _side(graph, node, side, depth)
    if "clip" in inputs or "TextEncode" in kind:
        names = [name for name in _TEXTS if name in inputs]
        names = names[:1] if names[:1] == ["populated_text"] else names
        texts = {_text(graph, node, name, depth).strip() for name in names}
        texts = (texts - {""}) or texts
        if len(texts) > 1:
            raise UnknownNode(f"the ComfyUI node {kind} gives each text encoder a prompt of its own")
        if texts:
            return texts.pop()
    if _is_text(graph, node):
        return _text_of(graph, node, depth)
    switched = next((name for name in sorted(inputs) if name.startswith(_SWITCH) and graph.link(node, name)), "")
    links = [name for name in ((switched,) if switched else _CONDITIONING) if graph.link(node, name)]
    texts = {_conditioned(graph, graph.link(node, name), side, depth + 1) for name in links}
    if len(texts) > 1:
        raise UnknownNode(f"the ComfyUI node {kind} mixes {len(texts)} prompts")
    if not texts:
        raise UnknownNode(f"its prompt comes from the ComfyUI node {kind}, which is not known here")
    return texts.pop()


def _text(graph: Graph, node: str, name: str, depth: int) -> str:
    """Return an input's text, or that of the nodes it comes from."""
    value = graph.inputs(node)[name]
    if isinstance(value, str):
        return value
    source = graph.link(node, name)
    if not source or depth > _DEEPEST:
        raise UnknownNode(f"the ComfyUI node {graph.kind(node)} has no text")
    return _text_of(graph, source, depth + 1)


def _is_text(graph: Graph, node: str) -> bool:
    return graph.kind(node) == _CONCATENATE or _PLAIN_TEXT.get(graph.kind(node)) in graph.inputs(node)


def _text_of(graph: Graph, node: str, depth: int) -> str:
    """Return the text that a node puts out."""
    kind, inputs = graph.kind(node), graph.inputs(node)
    if kind == _CONCATENATE:
        parts = [_text(graph, node, part, depth) for part in ("string_a", "string_b") if part in inputs]
        return str(inputs.get("delimiter", "")).join(parts)
    if _is_text(graph, node):
        return _text(graph, node, _PLAIN_TEXT[kind], depth)
    switched = next((name for name in sorted(inputs) if name.startswith(_SWITCH)), "")
    if switched:
        return _text(graph, node, switched, depth)
    raise UnknownNode(f"its prompt comes from the ComfyUI node {kind}, which is not known here")


# --- the rest --------------------------------------------------------------------------------------------------------


def _settings(graph: Graph, sampler: str) -> dict[str, Any]:
    """Return what the sampler and the nodes before it say, as far as they say it plainly."""
    own = [
        sampler,
        *(node for name in ("guider", "noise", "sigmas", "sampler") if (node := graph.link(sampler, name))),
    ]

    def value(names: tuple[str, ...], kinds: tuple[type, ...]) -> Any:
        for node in own:
            for name in names:
                found = graph.inputs(node).get(name)
                source = graph.link(node, name)
                if source:
                    found = next((it for key in _SEEDS if (it := graph.inputs(source).get(key)) is not None), None)
                if isinstance(found, kinds) and not isinstance(found, bool):
                    return found
        return None

    try:
        negative = _prompt(graph, sampler, "negative").strip()
    except UnknownNode:
        negative = ""
    loaders = (node for start in own if (first := graph.link(start, "model")) for node in graph.upstream(first))
    named = (graph.inputs(node).get(key) for node in loaders for key in _MODELS)
    found = {
        "model": next((it for it in named if isinstance(it, str)), None),
        "sampler": value(("sampler_name",), (str,)),
        "schedule": value(("scheduler",), (str,)),
        "guidance_scale": value(("cfg", "guidance"), (int, float)),
        "num_inference_steps": value(("steps",), (int,)),
        "negative_prompt": negative or None,
        "seed": value(("noise_seed", "seed"), (int,)),
    }
    return {name: it for name, it in found.items() if it is not None}
