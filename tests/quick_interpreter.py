"""Triton's interpreter, without what it repeats at every call of a function: a third of its time.

It replaces the functions of ``triton.language`` by interpreted ones when a kernel is launched, and again whenever the
kernel calls a function, though they still are. Where Triton has no such parts, all stays as it is.
"""

from __future__ import annotations

from types import FunctionType, ModuleType
from typing import Any

replaced: set[int] = set()
"""Those of Triton's two modules of the language whose functions are the interpreted ones now, by id."""


def make_quick() -> None:
    try:
        from triton import language
        from triton.runtime import interpreter

        patch, scope, numpy_type = interpreter._patch_lang, interpreter._LangPatchScope, interpreter._get_np_dtype
    except (ImportError, AttributeError):
        return

    def patch_once(function: FunctionType) -> Any:
        seen = (value for value in function.__globals__.values() if isinstance(value, ModuleType))
        new = {id(module) for module in seen if module in (language, language.core)} - replaced
        if not new and replaced:
            return scope()
        found = patch(function)
        restore = found.restore

        def restore_all() -> None:
            restore()
            replaced.difference_update(new)

        # Triton restores after a launch, and does not after a call.
        found.restore = restore_all
        replaced.update(new)
        return found

    known: dict[str, Any] = {}

    def known_numpy_type(kind: Any) -> Any:
        name = kind.element_ty.name if isinstance(kind, language.block_type) else kind.name
        if name not in known:
            known[name] = numpy_type(kind)
        return known[name]

    interpreter._patch_lang = patch_once
    interpreter._get_np_dtype = known_numpy_type
