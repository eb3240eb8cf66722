"""The modules that recipes name, such as ``text_decoder`` and ``vision_tower``, and the tensors of each.

mergekit has a list of modules for each architecture, and takes the prefixes of layers as modules of others. Here, names
of tensors tell.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

from ..errors import ConfigError
from ..methods import nearest
from ..text import some

# Parts of tensors' names, by the names of their module. The first that matches counts.
_KINDS = {
    ("multi_modal_projector", "projector", "connector"): re.compile(
        r"(^|\.)(multi_modal_projector|mm_projector|connector|embed_vision|vision_adapter)\."
        r"|(^|\.)visual\.(merger|deepstack_merger_list)\."
    ),
    ("vision_tower", "vision_model", "vision_encoder", "visual"): re.compile(
        r"(^|\.)(vision_tower|vision_model|vision_encoder|visual)\."
    ),
    ("audio_tower", "audio_model", "audio_encoder"): re.compile(r"(^|\.)(audio_tower|audio_model|audio_encoder)\."),
}
# The module of all other tensors.
TEXT = ("text_decoder", "default")


def tensors_of_modules(modules: Collection[str], names: Iterable[str]) -> dict[str, list[str]]:
    """Distribute tensors over the modules of a recipe.

    A module is one of the kinds above, a part of names (``encoder``, ``model.visual.blocks``), or ``text_decoder`` or
    ``default``, which has the rest.

    Args:
        modules: names of the recipe's modules.
        names: names of tensors.

    Returns:
        The tensors of each module; those of no module of the recipe are under an empty name.

    Raises:
        ConfigError: a module has no tensors; the message has those that there are.

    Examples:
        >>> tensors_of_modules(["text_decoder"], ["model.layers.0.w", "vision_tower.w", "lm_head.weight"])
        {'text_decoder': ['model.layers.0.w', 'lm_head.weight'], '': ['vision_tower.w']}
    """
    found: dict[str, list[str]] = {module: [] for module in modules}
    rest = next((module for module in TEXT if module in found), "")
    own = sorted(found.keys() - {*TEXT, *(name for kind in _KINDS for name in kind)}, key=len, reverse=True)
    own_patterns = {module: re.compile(rf"(^|\.){re.escape(module)}\.") for module in own}
    seen: dict[str, None] = {}
    for name in names:
        module = next((module for module, pattern in own_patterns.items() if pattern.search(name)), None)
        kind = next((names for names, pattern in _KINDS.items() if pattern.search(name)), None)
        seen[kind[0] if kind else TEXT[0]] = None
        if module is None:
            module = rest if kind is None else next((alias for alias in kind if alias in found), "")
        if module is None or (module == "" and kind is None and "shared" in found and _is_shared(name)):
            module = "shared"
        found.setdefault(module, []).append(name)
    for module, tensors in found.items():
        if module and not tensors:
            known = list(seen)
            raise ConfigError(
                f"modules: no tensor belongs to {module!r}; did you mean {nearest(module, known)!r}? The models have "
                f"{some(known, 6)}; parts of the names of tensors, such as 'encoder', are modules, too"
            )
    return found


def _is_shared(name: str) -> bool:
    """Whether an encoder-decoder model has a tensor outside of both, such as T5's head."""
    return name.startswith(("shared.", "lm_head."))
