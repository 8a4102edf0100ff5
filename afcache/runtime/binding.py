"""Our forward on a transformer instance: put in place of the host's, found again, taken away. No class is changed."""

import contextlib
import functools
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch

from afcache.models.families import transformers_of
from afcache.runtime.host import ORIGINAL, original_forward
from afcache.runtime.runtime import Runtime

_ATTRIBUTE = "_afcache"


def bind(transformer: Any, runtime: Runtime) -> None:
    """Answer the transformer's calls by a runtime from now on, in place of the present one.

    Raises:
        NotImplementedError: something else has replaced the forward.

    """
    check_bindable(transformer, runtime)
    if bound_runtime(transformer) is not None and _hooked_over(transformer):
        # What a hook does around the forward belongs to computed steps.
        release(transformer)
    previous = bound_runtime(transformer)
    if runtime.host is not None:
        runtime.host.attach()
    if previous is None:
        _put_in_place(transformer)
    setattr(transformer, _ATTRIBUTE, runtime)


def check_bindable(transformer: Any, runtime: Runtime) -> None:
    """Raise where `bind` would.

    Raises:
        NotImplementedError: something else has replaced the forward.

    """
    if runtime.host is None:
        _check_forward(transformer)


@contextlib.contextmanager
def set_aside(transformer: Any) -> Iterator[None]:
    """Undo what `compile="blocks"` did to the transformer, for other settings; and do it again if they are refused."""
    runtime = bound_runtime(transformer)
    host = None if runtime is None else runtime.host
    if host is None:
        yield
        return
    host.release()
    try:
        yield
    except BaseException:
        host.attach()
        raise


def release(transformer: Any) -> None:
    """The transformer, or the one that torch.compile wrapped, runs its own forward again."""
    transformer = _unwrapped(transformer)
    runtime = bound_runtime(transformer)
    if runtime is not None and runtime.host is not None:
        runtime.host.release()
    for name in ("forward", "_old_forward"):
        if _is_ours(transformer.__dict__.get(name)):
            _put_back(transformer, name)
    own = original_forward(transformer)
    for link, name in _hooked_over(transformer):
        setattr(link, name, own)
    delattr(transformer, _ATTRIBUTE)
    transformer.__dict__.pop(ORIGINAL, None)


def bound_runtime(transformer: Any) -> Runtime | None:
    """The runtime that `compile_pipeline` gave this transformer, or the one that torch.compile wrapped since, if any."""
    return _unwrapped(transformer).__dict__.get(_ATTRIBUTE)


def require_runtime(pipe: Any) -> Runtime:
    """The runtime of the first transformer of a pipeline that was compiled; raises as `require_runtimes` does."""
    return require_runtimes(pipe)[0]


def require_runtimes(pipe: Any) -> list[Runtime]:
    """The runtimes of all transformers of a pipeline that was compiled.

    Raises:
        ValueError: it was not, or it was restored already.

    """
    transformers = [each for each in transformers_of(pipe) if isinstance(each, torch.nn.Module)]
    runtimes = [runtime for runtime in map(bound_runtime, transformers) if runtime is not None]
    if not runtimes:
        raise ValueError(
            f"pipe was not passed to afcache.compile_pipeline, or it was restored already (got a {type(pipe).__name__}). Call "
            "afcache.compile_pipeline(pipe) first."
        )
    return runtimes


def _unwrapped(transformer: Any) -> Any:
    """The module inside what `torch.compile(transformer)` returned, whose calls reach the forward that is bound to it."""
    return transformer._orig_mod if isinstance(transformer, torch._dynamo.OptimizedModule) else transformer


def _check_forward(transformer: Any) -> None:
    """Refuse a root forward that is neither the class's nor accelerate's: binding ours would bypass it."""
    if transformer._compiled_call_impl is not None:
        raise NotImplementedError(
            "transformer was compiled in place by transformer.compile(). Load it afresh: compile_pipeline compiles it. Or keep "
            "what is compiled: compile_pipeline(pipe, compile='blocks')."
        )
    forward = transformer.__dict__.get("forward")
    if _is_ours(forward):
        forward = transformer.__dict__.get(ORIGINAL)
    is_own = getattr(forward, "__func__", None) is type(transformer).forward
    if forward is not None and not is_own and not hasattr(transformer, "_hf_hook"):
        raise NotImplementedError(
            f"transformer.forward was replaced by {_name(forward)} (by a diffusers hook, such as group offload, or by hand), "
            "which a cached forward would bypass. Remove that first, or let it run: "
            "compile_pipeline(pipe, compile='blocks')."
        )


def _name(function: Any) -> str:
    return getattr(getattr(function, "func", function), "__qualname__", type(function).__name__)


def _put_in_place(transformer: Any) -> None:
    """Put our forward where the original would be called, and remember what was there.

    Where accelerate has installed a hook, its wrapper calls `_old_forward` and puts that back as `forward` after each
    image; binding `forward` would be undone by it.
    """
    name = "_old_forward" if hasattr(transformer, "_hf_hook") else "forward"
    transformer.__dict__[ORIGINAL] = transformer.__dict__.get(name)
    transformer.__dict__[name] = types.MethodType(_forward_of(type(transformer)), transformer)


def _put_back(transformer: Any, name: str) -> None:
    """Undo `_put_in_place` at the place where accelerate may have moved our forward since."""
    original = transformer.__dict__.get(ORIGINAL)
    if original is None and name == "forward":
        del transformer.__dict__[name]
    else:
        transformer.__dict__[name] = original or types.MethodType(type(transformer).forward, transformer)


def _hooked_over(transformer: Any) -> list[tuple[Any, str]]:
    """Where diffusers' hooks, installed since, hold our forward as the one that they are around."""
    links = getattr(transformer.__dict__.get("_diffusers_hook"), "_fn_refs", ())
    return [(link, name) for link in links for name in ("forward", "original_forward") if _is_ours(getattr(link, name))]


def _is_ours(method: object) -> bool:
    return isinstance(method, types.MethodType) and getattr(method.__func__, _ATTRIBUTE, False)


@functools.cache
def _forward_of(kind: type) -> Callable[..., Any]:
    """The function that is bound, with the signature of the class's forward: modular pipelines pass what that names."""

    # Where torch.compile is put around the transformer it leaves this call alone: tracing what is around the step would take
    # dozens of graphs for nothing, and the step inside has its own.
    @torch.compiler.disable(reason="afcache compiles the step itself. Leave fullgraph=True out, or leave it unwrapped.")
    @functools.wraps(kind.forward)  # pyright: ignore[reportAttributeAccessIssue]
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return _answer(self, *args, **kwargs)

    setattr(forward, _ATTRIBUTE, True)
    return forward


def _answer(self: Any, *args: Any, **kwargs: Any) -> Any:
    """A call: cached, or the host's own inside `uncached` and where a wrapper outlived `restore_pipeline`."""
    runtime = bound_runtime(self)
    if runtime is None or runtime.is_bypassed:
        return original_forward(self)(*args, **kwargs)
    if runtime.host is not None:
        runtime.host.check()
    runtime.check_sharing()
    calls = runtime.family.calls
    if calls.passes is not None and calls.passes(runtime.reader, args, kwargs):
        if runtime.host is not None:
            runtime.host.prepare()
        return original_forward(self)(*args, **kwargs)
    return calls.answer(self, runtime.reader, runtime.forward, *args, **kwargs)
