"""What is asked for over HTTP, and what becomes of it."""

from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, model_validator

from afcache.settings.presets import PRESETS

State = Literal["waiting", "drawing", "drawn", "failed", "cancelled"]
_TEXT = 4096


class Asked(BaseModel):
    """One image. What is left out is the model's own, or what the server was started with."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    prompt: str = Field(min_length=1, max_length=_TEXT)
    negative_prompt: str | None = Field(default=None, max_length=_TEXT)
    steps: int | None = Field(default=None, ge=1, le=1000)
    seed: int = Field(default=0, ge=0, lt=2**63)
    width: int | None = Field(default=None, ge=8, le=4096)
    height: int | None = Field(default=None, ge=8, le=4096)
    guidance_scale: float | None = Field(default=None, ge=0, le=100)
    true_cfg_scale: float | None = Field(default=None, ge=1, le=100)
    preset: Literal["quality", "balanced", "fast"] | None = None
    tolerance: float | None = Field(default=None, ge=0, le=1)

    @model_validator(mode="after")
    def _careful_once(self) -> "Asked":
        if self.preset is not None and self.tolerance is not None:
            raise ValueError("preset and tolerance exclude each other: a preset is a tolerance by its name")
        return self

    def budget(self) -> float | None:
        """The tolerance that was asked for, by its number or by a preset's name."""
        if self.tolerance is not None or self.preset is None:
            return self.tolerance
        return PRESETS[self.preset].tolerance

    def arguments(self, defaults: dict[str, Any]) -> dict[str, Any]:
        """Of the pipeline's call, without a generator.

        Args:
            defaults: of whatever the request leaves out.

        """
        given = {
            "prompt": self.prompt,
            "negative_prompt": self.negative_prompt,
            "num_inference_steps": self.steps,
            "width": self.width,
            "height": self.height,
            "guidance_scale": self.guidance_scale,
            "true_cfg_scale": self.true_cfg_scale,
        }
        return {**defaults, **{name: value for name, value in given.items() if value is not None}}

    def shape(self, defaults: dict[str, Any]) -> str:
        """By which requests are sent to where others like them are drawn: such share calls, and graphs of them."""
        found = self.arguments(defaults)
        is_guided = found.get("negative_prompt") is not None and found.get("true_cfg_scale", 1.0) > 1
        sides = f"{found.get('width', 'own')}x{found.get('height', 'own')}"
        return sides + (" guided" if is_guided else "")


class Progressed(NamedTuple):
    """A request is further on.

    Attributes:
        done: steps behind it; steps: all of them.
        pattern: F for each step that was computed, . for one that was forecast.
        replica: where it is drawn.
        checkpoint: with which another replica goes on; None where the last one is young enough.

    """

    done: int
    steps: int
    pattern: str
    replica: str
    checkpoint: bytes | None = None


class Drawn(NamedTuple):
    """A request has its image.

    Attributes:
        image: PNG.
        pattern: what its steps did.
        replica: where it was drawn.
        metrics: the replica's own.

    """

    image: bytes
    pattern: str
    replica: str
    metrics: dict[str, float]


class Failed(NamedTuple):
    """A request cannot be drawn, here or anywhere.

    Attributes:
        reason: in words.

    """

    reason: str


Event = Progressed | Drawn | Failed


class Seen(BaseModel):
    """What is known of a request."""

    id: str
    state: State
    done: int = 0
    steps: int = 0
    pattern: str = ""
    replica: str | None = None
    moved: int = Field(default=0, description="replicas that died under it")
    resumed: int | None = Field(default=None, description="steps that were not done again when it moved last")
    seconds: float | None = Field(default=None, description="from acceptance to the image")
    error: str | None = None
