"""Find the U-Net in what a file holds, by the tensors that every U-Net of a layout has, whatever wraps it."""

import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from unet_denoiser.convert.dtypes import describe_quantisation
from unet_denoiser.convert.key_maps import LAYOUTS
from unet_denoiser.convert.layout import BlockStructure
from unet_denoiser.convert.pickles import Inert, describe_object
from unet_denoiser.utils.tensor_files import MAX_TENSORS

OWN_MARKER = "time_mlp.1.weight"
_MAX_DEPTH, _MAX_CONTAINERS, _MAX_PLACES = 6, 10_000, 50
# for each layout, our own included: the first and the last tensor of a network
_SIGNS = {layout.marker: layout.key_map("output.2.weight", BlockStructure(0, 0)).name for layout in LAYOUTS.values()}
_SIGNS[OWN_MARKER] = "output.2.weight"
# what torch.compile, FSDP and activation checkpointing put into names; at their beginning it is a prefix
_WRAPPERS = re.compile(r"(?<=\.)(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_AVERAGED = re.compile(r"(?<![a-z])(ema|swa)(?![a-z])|average|shadow")
PROCESS_MARKS = frozenset({"v_pred", "ztsnr"})  # empty tensors that say what a Stable Diffusion predicts
_NOT_WEIGHTS = re.compile(r"optim|exp_avg|momentum|grad(?![a-z])")
_LORA = re.compile(r"\.lora_[AB]\.|\.lora_(down|up)\.|[._]lora\.(down|up)\.|_lora\.(down|up)\.|hada_w1|lokr_w1")


class Place(NamedTuple):
    """A network in a file: the path and prefix before its names, and its tensors by the rest of their names.

    marks: names among `PROCESS_MARKS` that lie beside it.
    """

    name: str
    tensors: dict[str, Tensor]
    marks: frozenset[str]

    @property
    def is_averaged(self) -> bool:
        """Return True if the path says that these are averaged weights."""
        return _AVERAGED.search(re.sub(r"(?<=[a-z])(?=[A-Z])", "_", self.name).lower()) is not None


def find_network(content: Any, *, ema: bool = False, prefix: str | None = None) -> Place:
    """Return the one network in `content`: tensors by name, or any nest of mappings and lists of them.

    Args:
        ema: take the averaged weights of a file that has both.
        prefix: which to take of several, by the name that the error gives.

    Raises:
        ValueError: no network, or several that could be meant, by name.
    """
    mappings = list(_list_mappings(content))
    if (largest := max((len(tensors) for _, tensors in mappings), default=0)) > MAX_TENSORS:
        raise ValueError(f"it has {largest:,} tensors; the largest networks have some thousand")
    places = [place for path, tensors in mappings for place in _list_places(path, tensors)]
    if prefix is not None:
        found = [place for place in places if place.name == prefix.rstrip(".")]
        if len(found) != 1:
            names = ", ".join(repr(place.name) for place in places) or "none"
            raise ValueError(f"prefix={prefix!r}: no network is there; networks in the file: {names}")
        return found[0]
    if not places:
        raise ValueError(_describe_content(content, mappings))
    places = [place for place in places if not _NOT_WEIGHTS.search(place.name.lower())] or places
    averaged = [place for place in places if place.is_averaged]
    others = [place for place in places if not place.is_averaged]
    if not averaged and len(others) == 2 and isinstance(content, list | tuple):
        others, averaged = others[:1], others[1:]  # [model, optimizer, ..., averages], as DDPM's port saves
    if ema and not averaged:
        listed = _has_key(content, "shadow_params")
        reason = "; shadow_params is a list without names, which only its own code can read" if listed else ""
        raise ValueError(f"ema=True: the file has no averaged weights beside the others{reason}")
    candidates = _without_aliases(averaged if ema or not others else others)
    if len(candidates) > 1:
        names = " and ".join(repr(place.name) for place in candidates)
        raise ValueError(f"the file has several networks: {names}; choose with prefix={candidates[0].name!r}")
    return candidates[0]


def _without_aliases(places: list[Place]) -> list[Place]:
    """Leave out networks that are the same tensors under another name."""
    by_memory = {next(iter(place.tensors.values())).data_ptr() or id(place): place for place in reversed(places)}
    return list(reversed(by_memory.values()))


def _list_mappings(content: Any) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """List all mappings with tensors in a nest, each with its path."""
    queue, seen = [("", content, 0)], {id(content)}
    for path, value, depth in queue:
        tensors: dict[str, Tensor] = {}
        for key, child in _list_children(value):
            if isinstance(child, Tensor):
                tensors[_WRAPPERS.sub("", str(key))] = child
            elif depth < _MAX_DEPTH and len(queue) < _MAX_CONTAINERS and id(child) not in seen:
                seen.add(id(child))
                queue.append((f"{path}{key}.", child, depth + 1))
        if tensors and isinstance(value, Mapping):
            yield path, tensors


def _list_children(value: Any) -> Iterator[tuple[Any, Any]]:
    """List the tensors and containers in a container, with their keys."""
    items = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list | tuple) else ()
    return ((key, child) for key, child in items if isinstance(child, Tensor | Mapping | list | tuple))


def _list_places(path: str, tensors: dict[str, Tensor]) -> list[Place]:
    """List the networks in one mapping; those without an end, such as a ControlNet, only if there is no whole one."""
    whole: dict[str, str] = {}
    parts: dict[str, str] = {}
    flat: dict[str, str] = {}  # LDM's averages have names without dots: model_ema.diffusion_modelinput_blocks00weight
    for name in tensors:
        for marker, last in _SIGNS.items():
            if name == marker or name.endswith(f".{marker}"):
                prefix = name[: -len(marker)]
                (whole if prefix + last in tensors else parts)[prefix] = marker
            elif name.endswith(flat_marker := marker.replace(".", "")):
                flat[name.removesuffix(flat_marker)] = marker
    if len(whole) + len(parts) + len(flat) > _MAX_PLACES:
        raise ValueError(f"it has more than {_MAX_PLACES} networks")
    others = [*whole, *parts, *(prefix[: prefix.rfind(".") + 1] or prefix for prefix in flat)]
    found = whole or {prefix: marker for prefix, marker in parts.items() if marker != OWN_MARKER}
    places = {prefix: _cut_out(path, prefix, tensors, others) for prefix in found}
    averages = []
    for flat_prefix, marker in flat.items():
        if base := next((places[prefix] for prefix in found if found[prefix] == marker), None):
            names = {name: flat_prefix + name.replace(".", "") for name in base.tensors}
            known = {name: tensors[flat_name] for name, flat_name in names.items() if flat_name in tensors}
            averages.append(Place(path + flat_prefix, known, base.marks))
    return [*places.values(), *averages]


def _cut_out(path: str, prefix: str, tensors: Mapping[str, Tensor], others: list[str]) -> Place:
    """Return the tensors below a prefix that do not belong to another network."""
    inside = tuple(other for other in others if other.startswith(prefix) and other != prefix)
    own = {
        name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix) and not name.startswith(inside) and name not in PROCESS_MARKS
    }
    return Place((path + prefix).rstrip("."), own, frozenset(tensors.keys() & PROCESS_MARKS))


def _has_key(value: Any, key: str, depth: int = 0) -> bool:
    if not isinstance(value, Mapping) or depth > 2:
        return False
    return key in value or any(_has_key(child, key, depth + 1) for child in value.values())


def _describe_content(content: Any, mappings: list[tuple[str, dict[str, Tensor]]]) -> str:
    """Say what is there instead of a U-Net."""
    if isinstance(content, Inert):
        kind = describe_object(content)
        return f"it holds an object of {kind}, not tensors; save its network's state_dict() with its own code"
    if not isinstance(content, Mapping | list | tuple):
        return f"it holds a {describe_object(content)}, not a state dict"
    names = [path + name for path, tensors in mappings for name in tensors]
    if any(map(_LORA.search, names)):
        return "it is a LoRA, not a network; merge it with merge_lora, or convert NETWORK OUT --lora FILE"
    if quantised := describe_quantisation(names):
        return f"it holds {quantised}; give the file that they were made from"
    objects = [describe_object(child) for child in (content.values() if isinstance(content, Mapping) else content)]
    kept = [f"an object of {name}" for name in objects if "." in name]
    some = ", ".join([*sorted(names)[:3], *kept[:2]]) or "no tensors at all"
    return f"not a U-Net of this family: it has {some}; expected one of {', '.join(_SIGNS)}"
