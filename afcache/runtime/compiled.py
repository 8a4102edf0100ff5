"""The step as a function of tensors, how it is compiled, and how it is called then: checked twice an image, not at every step.

Compiled, the checks are Dynamo's guards; in eager mode they are the shape annotations of every function.
"""

import functools
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.eval_frame import _debug_get_cache_entry_list
from torch._dynamo.exc import FailOnRecompileLimitHit
from torch.utils import _pytree as pytree

from afcache._typing import unchecked
from afcache.functional.given import given_model
from afcache.functional.model import Model, Sizes
from afcache.functional.outputs import full_forward
from afcache.functional.ranks.step import Layout, forward_together, gather, share, share_forward
from afcache.functional.state import CacheState, StepRecord
from afcache.functional.step import HistoryWriter, take
from afcache.functional.update import Branch, Taken
from afcache.runtime.subclasses import opening
from afcache.settings.config import CacheConfig


@dataclass(frozen=True)
class CompileOptions:
    """How the forward is compiled; the meaning of the fields is torch.compile's.

    Two fields are ours. `keeps_host`: computed steps are the host's own forward, and only what is around it is compiled as a
    function. `opens_subclasses`: weights are tensor subclasses, which branches of torch.cond take in parts.
    """

    enabled: bool = True
    backend: str | Callable[..., Any] = "inductor"
    mode: str | None = None
    dynamic: bool | None = None
    keeps_host: bool = False
    opens_subclasses: bool = False

    @property
    def uses_cuda_graphs(self) -> bool:
        """Whether outputs are overwritten by the next call."""
        return self.enabled and (self.mode in ("reduce-overhead", "max-autotune") or self.backend == "cudagraphs")

    def tuning(self) -> dict[str, Any]:
        """The arguments of torch.compile that choose among inductor's settings.

        A step has hundreds of parameters as inputs. Dynamo's guards have checked their shapes by then; checking them again in
        the generated code is time that a cached step notices.
        """
        if self.backend != "inductor":
            return {"mode": self.mode}
        chosen = {} if self.mode in (None, "default") else torch._inductor.list_mode_options(self.mode)
        return {"options": {**chosen, "size_asserts": False}}


class CompiledStep:
    """A function of its own code object under torch.compile: its cache and its recompile limit are its alone.

    Args:
        function: what to compile; takes positional arguments.
        compiler: torch.compile.
        options: how; nothing is compiled if they say so.

    """

    def __init__(
        self, function: types.FunctionType, compiler: Callable[..., Callable[..., Any]], options: CompileOptions
    ) -> None:
        self._options = options
        self._compiler = compiler
        self._function = function
        self._compiled: Callable[..., Any] = function
        self._start_afresh()

    def _start_afresh(self) -> None:
        """Forget what was compiled so far."""
        options = self._options
        self._function = self._compiled = _fresh_code(self._function)
        if options.enabled:
            how = options.tuning()
            backend = opening(_compile_graph(options.backend, **how)) if options.opens_subclasses else options.backend
            how = {} if options.opens_subclasses else how
            self._compiled = self._compiler(self._function, fullgraph=True, backend=backend, dynamic=options.dynamic, **how)

    def __call__(self, *args: Any) -> Any:
        """Check all guards, compile if none fit, and run.

        Where Dynamo's limit of graphs for one function is reached (8), all are forgotten: their number stays bounded, and
        whoever switches adapters for the ninth time waits once more instead of getting an error.
        """
        # Python numbers that have changed (an epsilon) would become symbols, and torch.cond takes none.
        with torch._dynamo.config.patch(specialize_float=True):
            try:
                return self._own(self._compiled(*args))
            except FailOnRecompileLimitHit:
                self._start_afresh()
                return self._own(self._compiled(*args))

    def without_guards(self, *args: Any) -> Callable[..., Any]:
        """The code that a call with these arguments would run, as a function that checks nothing.

        A step has hundreds of guards, one for each module and parameter that the trace read, and checking them takes a third
        of a cached step. Within one image they give the same answer every time. The function reads weights anew at every
        call, and heeds autocast; of anything else that changes it knows nothing. Where nothing is compiled, it does without
        checking shapes.

        Args:
            args: of a call that is about to be made.

        Returns:
            a function of arguments of the same metadata; this step itself where none of the compiled code fits.

        """
        if not self._options.enabled:
            return self._call_unchecked
        names = self._function.__code__.co_varnames[: self._function.__code__.co_argcount]
        cells = zip(self._function.__code__.co_freevars, self._function.__closure__ or (), strict=True)
        scope = {**dict(zip(names, args, strict=True)), **{name: cell.cell_contents for name, cell in cells}}
        for entry in _debug_get_cache_entry_list(self._function.__code__):
            # None: Dynamo ran this one uncompiled.
            if entry.code is not None and entry.guard_manager.check(scope):
                return self._settled(_with_code(self._function, entry.code))
        return self

    def _settled(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Compiled code as a step, as long as autocast stays what it was traced under; under another, guards are checked."""
        traced = _autocast()

        def step(*args: Any) -> Any:
            return self._own(function(*args)) if _autocast() == traced else self(*args)

        return step

    def _call_unchecked(self, *args: Any) -> Any:
        with unchecked():
            return self._function(*args)

    def _own(self, results: Any) -> Any:
        """Results in memory that the next call does not overwrite."""
        return pytree.tree_map_only(Tensor, torch.clone, results) if self._options.uses_cuda_graphs else results


def _compile_graph(
    backend: str | Callable[..., Any], *, mode: str | None = None, options: dict[str, Any] | None = None
) -> Callable[..., Any]:
    """A backend as torch.compile would call it with these arguments."""
    known = torch._dynamo.lookup_backend(backend) if isinstance(backend, str) else backend
    chosen = {} if mode is None else {"mode": mode}
    return functools.partial(known, **chosen, **({} if options is None else {"config_patches": options}))


def _autocast() -> tuple[Any, ...]:
    """Which kinds of devices autocast is on for, and to what; read in a microsecond."""
    return tuple(torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None for kind in ("cpu", "cuda"))


def _fresh_code(function: types.FunctionType) -> types.FunctionType:
    return _with_code(function, function.__code__.replace())


def _with_code(function: types.FunctionType, code: types.CodeType) -> types.FunctionType:
    copy = types.FunctionType(code, function.__globals__, function.__name__, function.__defaults__, function.__closure__)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


def cached_step(model: Model, layout: Layout | None, config: CacheConfig, writer: HistoryWriter | None) -> Any:
    """One call's step as a function of tensors; on several ranks velocities are of all branches.

    `states` are those of the guidance branches that share the call: mostly one. Where ranks forecast outputs and share out
    guidance branches they are all branches', and `inputs` are those of this rank's.
    """

    def alone(inputs: Any, states: Any, schedule: Any, coupling: Any) -> Any:
        branches = _branches(model, inputs, states)
        return _of_call(take(model, branches, schedule, coupling, config=config, writer=writer))

    def share_tokens(inputs: Any, states: Any, schedule: Any, coupling: Any) -> Any:
        assert layout is not None
        (state,) = states
        local, mine = share(model, inputs, layout)
        (taken,) = take(local, (Branch(mine, state),), schedule, coupling, config=config, writer=writer)
        return gather(taken.velocity, model, inputs, layout), (taken.state,), taken.record, None

    def share_model(inputs: Any, states: Any, schedule: Any, coupling: Any) -> Any:
        assert layout is not None
        (state,) = states
        shared = share_forward(model, layout)
        (taken,) = take(shared, (Branch(inputs, state),), schedule, coupling, config=config, writer=writer)
        return taken.velocity[None], (taken.state,), taken.record, taken.lead

    def share_branches(inputs: Any, states: Any, schedule: Any, coupling: Any) -> Any:
        assert layout is not None
        branches = tuple(Branch(inputs, state) for state in states)
        taken = take(share_forward(model, layout), branches, schedule, coupling, config=config, writer=writer)
        _, states, record, _ = _of_call(taken)
        return torch.stack([each.velocity for each in taken]), states, record, None

    if layout is None:
        return alone
    if not config.forecasts_output:
        return share_tokens
    return share_model if layout.cfg.size == 1 else share_branches


def _branches(model: Model, inputs: Any, states: Any) -> tuple[Branch, ...]:
    """The guidance branches of a call."""
    if len(states) == 1:
        return (Branch(inputs, states[0]),)
    assert model.architecture.split is not None
    return tuple(map(Branch, model.architecture.split(inputs, len(states)), states))


def _of_call(taken: tuple[Taken, ...]) -> Any:
    """Velocities of a call's branches one after the other in the batch, their states, the call's record, and its lead.

    States and record are made anew: before torch 2.13, Dynamo cannot return a named tuple that `_replace` has made.
    """
    first, states = taken[0], tuple(CacheState(*each.state) for each in taken)
    if len(taken) == 1:
        return first.velocity, states, StepRecord(*first.record), first.lead
    # The guided velocity's error is the last branch's.
    last = taken[-1].record
    record = first.record._replace(predicted_error=last.predicted_error, measured_error=last.measured_error)
    return torch.cat([each.velocity for each in taken]), states, record, None


def given_step(sizes: Sizes, config: CacheConfig, writer: HistoryWriter | None, *, is_computed: bool) -> Any:
    """What is around the host's own forward: the end of a computed step, or the whole of a cached one.

    Args:
        sizes: of the transformer.
        config: settings.
        writer: how the history is updated.
        is_computed: which of the two; known before the step.

    """
    model = given_model(sizes)

    def step(inputs: Any, states: Any, schedule: Any, coupling: Any) -> Any:
        branches = _branches(model, inputs, states)
        known = coupling._replace(known=is_computed)
        return _of_call(take(model, branches, schedule, known, config=config, writer=writer))

    return step


def full_step(model: Model, layout: Layout | None) -> Any:
    """The forward without a cache."""

    def alone(inputs: Any) -> Tensor:
        return full_forward(model, inputs)

    def together(inputs: Any) -> Tensor:
        assert layout is not None
        return forward_together(model, inputs, layout)

    return alone if layout is None else together
