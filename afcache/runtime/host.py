"""The transformer's own forward, run at computed steps as its owner runs it: compiled, quantised, offloaded or shared out."""

import contextlib
import types
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

from afcache.models.family import Call
from afcache.runtime.compiled import CompileOptions

# Where a bound transformer keeps the forward that ours stands for, if that was not its class's.
ORIGINAL = "_afcache_original_forward"


def original_forward(transformer: Any) -> Callable[..., Any]:
    """The forward that ours stands for."""
    return transformer.__dict__.get(ORIGINAL) or types.MethodType(type(transformer).forward, transformer)


def sharing_of(transformer: Any) -> Any:
    """How diffusers shares the transformer's work out among processes (`enable_parallelism`); None if it does not."""
    return getattr(transformer, "_parallel_config", None)


class Host:
    """A transformer whose forward stays its own.

    Args:
        transformer: the host's.
        options: how we compile its repeated blocks, where nobody has compiled anything of it.

    """

    def __init__(self, transformer: Any, options: CompileOptions) -> None:
        self._transformer = transformer
        self._options = options
        self._compiled_call: Any = None
        self._ours: list[tuple[nn.Module, Any]] = []
        self._is_ready = False

    def attach(self) -> None:
        """Let calls reach the forward that is bound: what `transformer.compile()` has made runs at computed steps alone."""
        self._compiled_call, self._transformer._compiled_call_impl = self._transformer._compiled_call_impl, None

    def release(self) -> None:
        """Give back what `attach` took, and forget what we have compiled; what somebody has compiled since stays."""
        if self._transformer._compiled_call_impl is None:
            self._transformer._compiled_call_impl = self._compiled_call
        for module, compiled in self._ours:
            if module._compiled_call_impl is compiled:
                module._compiled_call_impl = None
        self._ours, self._is_ready = [], False

    def check(self) -> None:
        """Raise where the transformer was compiled over the forward that is bound.

        Raises:
            NotImplementedError: it was.

        """
        if self._transformer._compiled_call_impl is not None:
            raise NotImplementedError(
                "transformer was compiled in place by transformer.compile() after compile_pipeline, which compiles the cache "
                "with it. Compile it first: afcache.restore_pipeline(pipe), transformer.compile(...), compile_pipeline(...)."
            )

    def __call__(self, call: Call) -> Tensor:
        """The velocity of one call."""
        assert call.ask is not None
        original = original_forward(self._transformer)
        self.prepare()
        if self._compiled_call is None:
            return call.ask(original)
        with self._in_place(original):
            return call.ask(self._compiled_call)

    def prepare(self) -> None:
        """Compile the blocks that repeat, once; before the first call of any kind, or its graphs come with a later image."""
        if not self._is_ready:
            self._compile_blocks()
            self._is_ready = True

    def _compile_blocks(self) -> None:
        """Compile the blocks that repeat, each kind once, unless something is compiled already."""
        if not self._options.enabled or _exchanges_uneven_shares(self._transformer):
            return
        compiled = {id(module) for module in self._transformer.modules() if module._compiled_call_impl is not None}
        if compiled or self._compiled_call is not None or not getattr(self._transformer, "_repeated_blocks", None):
            return
        options = self._options
        self._transformer.compile_repeated_blocks(backend=options.backend, dynamic=options.dynamic, **options.tuning())
        modules = self._transformer.modules()
        self._ours = [(each, each._compiled_call_impl) for each in modules if each._compiled_call_impl is not None]

    @contextlib.contextmanager
    def _in_place(self, original: Any) -> Iterator[None]:
        """Inside the block the transformer's forward is its own: code that was compiled from it calls it by its name.

        Hooks of the transformer itself belong to the call that we answer, and have run by then.
        """
        attributes = self._transformer.__dict__
        name = "_old_forward" if hasattr(self._transformer, "_hf_hook") else "forward"
        own: dict[str, Any] = {name: original, "_forward_hooks": OrderedDict(), "_forward_pre_hooks": OrderedDict()}
        before = {key: attributes[key] for key in own}
        attributes.update(own)
        try:
            yield
        finally:
            attributes.update(before)


def _exchanges_uneven_shares(transformer: Any) -> bool:
    """Whether ranks hold different numbers of tokens: diffusers' exchange of those cannot be traced (0.42)."""
    shared = getattr(sharing_of(transformer), "context_parallel_config", None)
    return shared is not None and (shared.ulysses_anything or shared.ring_anything)
