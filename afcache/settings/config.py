"""CacheConfig: everything that can be set, checked when it is made."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any, Literal, get_args

from afcache._checks import LARGEST, check_choice, check_flag, check_integer, check_number, check_numbers, show
from afcache.settings.curve import Calibration
from afcache.settings.layerwise import Layerwise
from afcache.settings.rules import RULES, PolicyName, Rule

BatchDecisions = Literal["independent", "shared"]
Forecast = Literal["polynomial", "taylorseer", "chebyshev"]
Target = Literal["residual", "velocity", "noise"]
ErrorLaw = Literal["power", "remainder"]

# As many as schedules have steps.
_MOST_NODES = 1000


@dataclasses.dataclass(frozen=True, kw_only=True)
class CacheConfig:
    """What to cache and how carefully. Frozen: make another one with `dataclasses.replace`.

    Attributes:
        policy: what refreshes the whole stack. "adaptive": error control. Known beforehand: "fixed" (every `interval` steps),
            "growing" (at intervals that grow by `interval_growth`), "magcache" (from calibrated `magnitude_ratios`), "planned"
            (`refresh_steps`). Gates: "teacache" (the accumulated change of the first block's modulated input) and "dbcache"
            (the change of what the `first_blocks` add). "none" computes every step by our forward.
        tolerance: a step is refreshed when the predicted error since the last refresh would reach this (of N < 16 steps 16 / N
            times this); relative velocity error times sigma, weighted by the two below, finite, >= 0. 0 refreshes always.
        warmup_steps: steps at the start that are always computed; >= 1. "adaptive" computes two in any case, because an error
            must have been measured before a step can be forecast, and three of ten steps or fewer.
        max_growth: limit of the distance in sigma to the last refresh, over the one before; >= 1 or infinite. "adaptive" only.
        interval: distance between refreshes in steps, counted from the last warmup step; >= 1.
        interval_growth: "growing" adds this after each refresh and rounds down; >= 0.
        refresh_steps: "planned" refreshes at these steps, besides the warmup; like every plan they count from the first step
            that is walked, which with img2img's strength is not the schedule's.
        threshold: of "teacache", "dbcache" and "magcache", in their authors' units; >= 0, and 0 computes every step.
        max_cached_steps: the gates and "magcache" refresh after this many cached steps in a row; None means no limit.
        magnitude_ratios: "magcache": how the norm of the stack's residual changes at each step of a calibration run
            (`afcache.calibrate_magnitudes`); resampled to other step counts.
        target: what the history keeps and a cached step forecasts. "residual": what the blocks add to their tokens, in the
            model's dtype; embeddings and head run at every step. "velocity": what the model returns. "noise": where the
            straight line through the latents along that velocity arrives at noise level 1.1 (`afcache.functional.target`). The
            last two run nothing of the model at a cached step, and with guidance measure the guided velocity's error; gates,
            groups, and first and last blocks need "residual".
        first_blocks, last_blocks: that run at every step, at the stack's ends; "dbcache" needs a first one.
        forecast: "polynomial" (in sigma, on the real, unequal nodes), "taylorseer" (finite differences in step index, as
            TaylorSeer's authors define them) or "chebyshev" (ridge regression over step index, as Spectrum's).
        order: degree of the forecast; 0 to 4.
        max_nodes: how many refreshes the state remembers; at most 1000; None means order + 1, or 16 under "chebyshev".
        damping: 0 forecasts in full, 1 reuses what the last refresh kept.
        learns_damping: `damping` holds until each sample's refreshes have measured what it should have been; not with groups.
        error_law: how the forecast's error grows: "power" (a power of the distance to the last refresh) or "remainder" (the
            product of distances to all nodes of the row).
        error_exponent: highest power of "power"; > 0; None means order + 1.
        error_weight, early_weight: powers of sigma and of 1 / (4 - 4 sigma) by which a step's predicted error counts; >= 0.
        noise_floor: relative change that rounding alone makes between two evaluations of the model; it is taken off measured
            errors and gates' changes, so that quantisation noise does not count as change; >= 0. None means 0, except for
            quantised weights under "adaptive", whose noise is measured once, on one process, where our forward runs.
        correction: return what the forecast steps left out: at a refresh, under solvers that mix several outputs also after it.
        refresh_last_step: always compute the last step, so that the correction reaches the end.
        batch_decisions: "independent" (each sample decides, so that its result does not depend on its neighbours) or
            "shared" (all samples adopt every refresh, which computes fewer steps).
        layerwise: what groups of blocks do on other steps; None forecasts the stack as a whole.
        calibration: what `afcache.calibrate` measured to find these settings; no setting itself.

    Raises:
        ValueError: a value is out of its range or not one of its names, or two settings exclude each other.
        TypeError: a value is of the wrong kind.

    """

    policy: PolicyName = "adaptive"
    tolerance: float = 0.016
    warmup_steps: int = 3
    max_growth: float = 2.0
    interval: int = 4
    interval_growth: float = 0.0
    refresh_steps: tuple[int, ...] = ()
    threshold: float = 0.1
    max_cached_steps: int | None = None
    magnitude_ratios: tuple[float, ...] = ()
    target: Target = "residual"
    first_blocks: int = 0
    last_blocks: int = 0
    forecast: Forecast = "polynomial"
    order: int = 1
    max_nodes: int | None = None
    damping: float = 0.0
    learns_damping: bool = False
    error_law: ErrorLaw = "power"
    error_exponent: float | None = None
    error_weight: float = 0.0
    early_weight: float = 0.0
    noise_floor: float | None = None
    correction: bool = True
    refresh_last_step: bool = False
    batch_decisions: BatchDecisions = "independent"
    layerwise: Layerwise | None = None
    calibration: Calibration | None = dataclasses.field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        check_choice("policy", self.policy, tuple(RULES))
        check_choice("target", self.target, get_args(Target))
        check_choice("forecast", self.forecast, get_args(Forecast))
        check_choice("error_law", self.error_law, get_args(ErrorLaw))
        check_choice("batch_decisions", self.batch_decisions, get_args(BatchDecisions))
        check_number("tolerance", self.tolerance, 0.0, math.inf, cure="0 computes every step, 0.01 is careful")
        check_integer("warmup_steps", self.warmup_steps, 1, None)
        check_integer("interval", self.interval, 1, None)
        check_number("interval_growth", self.interval_growth, 0.0, math.inf)
        check_number("max_growth", self.max_growth, 1.0, math.inf, infinite=True, cure="float('inf') means no limit")
        check_number("threshold", self.threshold, 0.0, math.inf, cure="0 computes every step")
        if self.max_cached_steps is not None:
            check_integer("max_cached_steps", self.max_cached_steps, 0, None)
        for name in ("first_blocks", "last_blocks"):
            check_integer(name, getattr(self, name), 0, None)
        check_integer("order", self.order, 0, 4)
        check_number("damping", self.damping, 0.0, 1.0, cure="0 forecasts in full, 1 reuses")
        if self.error_exponent is not None:
            check_number("error_exponent", self.error_exponent, 1e-3, 10.0, cure="None means order + 1")
        check_number("error_weight", self.error_weight, 0.0, 10.0, cure="0 counts all steps alike")
        check_number("early_weight", self.early_weight, 0.0, 10.0, cure="0 counts all steps alike")
        if self.noise_floor is not None:
            check_number("noise_floor", self.noise_floor, 0.0, math.inf, cure="None measures it where weights are quantised")
        if self.max_nodes is not None:
            check_integer("max_nodes", self.max_nodes, self.order + 1, _MOST_NODES)
        for name in ("learns_damping", "correction", "refresh_last_step"):
            check_flag(name, getattr(self, name))
        check_numbers("magnitude_ratios", self.magnitude_ratios, 0.0, math.inf)
        _check_steps("refresh_steps", self.refresh_steps)
        self._check_combination()
        if self.calibration is not None and not isinstance(self.calibration, Calibration):
            raise TypeError(f"calibration must be what afcache.calibrate made, or None, got {show(self.calibration)}.")

    def _check_combination(self) -> None:
        if self.policy == "magcache" and not self.magnitude_ratios:
            raise ValueError(
                "magnitude_ratios must not be empty under policy 'magcache': measure them with "
                "afcache.calibrate_magnitudes(pipe, prompts), or take its authors' from afcache.policy('magcache')."
            )
        if self.policy == "dbcache" and self.first_blocks == 0:
            raise ValueError(
                "first_blocks must be at least 1 under policy 'dbcache', got 0: it decides by what these blocks add."
            )
        looks_inside = self.rule.is_gated or self.layerwise is not None or self.runs_sections
        if self.forecasts_output and looks_inside:
            sections = f"first_blocks={self.first_blocks}, last_blocks={self.last_blocks}"
            what = "layerwise=" if self.layerwise is not None else f"policy {self.policy!r}" if self.rule.is_gated else sections
            raise ValueError(
                f"target must be 'residual' with {what}, which looks inside the model, got {self.target!r}, as presets have. "
                "Start from afcache.policy('residual'), 'layerwise', 'teacache' or 'dbcache', or leave that out."
            )
        if self.layerwise is None:
            return
        if not isinstance(self.layerwise, Layerwise):
            raise TypeError(f"layerwise must be an afcache.Layerwise or None, got {show(self.layerwise)}.")
        if self.rule.is_gated or not self.rule.is_cached or self.first_blocks or self.last_blocks:
            raise ValueError(
                f"layerwise cannot be combined with policy {self.policy!r}, first_blocks={self.first_blocks} and "
                f"last_blocks={self.last_blocks}: its groups gate themselves. Use 'adaptive', 'fixed', 'growing', 'magcache' "
                "or 'planned' without first and last blocks."
            )
        if self.learns_damping:
            raise ValueError("learns_damping cannot be combined with layerwise: its groups are damped as `damping` says.")
        if self.forecast == "chebyshev":
            raise ValueError("layerwise cannot be combined with forecast 'chebyshev'; use 'polynomial' or 'taylorseer'.")

    @property
    def growth_exponent(self) -> float:
        """The highest power of the error law "power"."""
        return float(self.order + 1) if self.error_exponent is None else float(self.error_exponent)

    @property
    def num_nodes(self) -> int:
        """How many refreshes the state remembers."""
        if self.max_nodes is not None:
            return self.max_nodes
        return 16 if self.forecast == "chebyshev" else self.order + 1

    @property
    def rule(self) -> Rule:
        """What follows from the policy."""
        return RULES[self.policy]

    @property
    def forecasts_output(self) -> bool:
        """Whether what the model returns is forecast, so that a cached step runs nothing of it."""
        return self.target != "residual"

    @property
    def runs_sections(self) -> bool:
        """Whether some blocks run at every step, so that the others start from text and image tokens."""
        return bool(self.first_blocks or self.last_blocks)

    @property
    def num_groups(self) -> int:
        """Groups that decide for themselves; 0 where the stack is forecast as a whole."""
        return 0 if self.layerwise is None else self.layerwise.groups

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain values, for reports and files."""
        return dataclasses.asdict(self)

    def to_json(self, path: str | Path) -> None:
        """Write the settings, and the calibration they come from, to a file that `from_json` reads."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=2) + "\n")

    @classmethod
    def from_json(cls, path: str | Path) -> "CacheConfig":
        """Read settings; what the file leaves out has its default.

        Raises:
            OSError: the file cannot be read.
            ValueError: it holds no settings, or some that CacheConfig does not know or refuses.
            TypeError: a value is of the wrong kind.

        """
        try:
            values = json.loads(Path(path).read_text())
        except ValueError as error:
            raise ValueError(f"{path} is no JSON file of settings: {error}.") from error
        _check_fields(str(path), values, cls)
        return cls(**{name: _from_plain(name, value) for name, value in values.items()})


def _check_fields(where: str, values: object, kind: type) -> None:
    known = {field.name for field in dataclasses.fields(kind)}
    if not isinstance(values, dict) or not known.issuperset(values):
        found = show(sorted(set(values) - known)) if isinstance(values, dict) else type(values).__name__
        raise ValueError(f"{where} must be an object of {kind.__name__}'s fields, got {found}. CacheConfig.to_json writes one.")


def _from_plain(name: str, value: Any) -> Any:
    """A field as JSON keeps it, as it was."""
    if isinstance(value, list):
        return tuple(value)
    if name == "layerwise" and isinstance(value, dict):
        _check_fields(name, value, Layerwise)
        return Layerwise(**{inner: _from_plain(inner, each) for inner, each in value.items()})
    return Calibration.from_dict(value) if name == "calibration" and value is not None else value


def _check_steps(name: str, values: object) -> None:
    def is_step(value: object) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= LARGEST

    if not isinstance(values, tuple) or not all(map(is_step, values)):
        raise ValueError(f"{name} must be a tuple of step indices from 0, got {show(values)}.")
