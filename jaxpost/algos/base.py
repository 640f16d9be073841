"""What an algorithm is: a frozen dataclass whose fields are its config, with a batch source and a pure loss."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, Literal, Protocol

import jax.numpy as jnp
from jax.sharding import Mesh

from jaxpost.data.kinds import RowKind
from jaxpost.models.policy import Policy
from jaxpost.ops.segments import segment_sums
from jaxpost.types import Array, Batch, Frozen, Mean, Metrics, TrainState


class Source(Protocol):
    """An endless host iterator of batches that can say where it is and go back there."""

    info: dict[str, Any]  # host facts of the last batch: epoch, num_tokens, padding_fraction, example_ids, dropped/*

    def __next__(self) -> Batch: ...

    def state(self) -> dict: ...

    def restore(self, state: dict) -> None: ...

    def publish(self, state: TrainState, version: int) -> None: ...

    def close(self) -> None: ...


@dataclasses.dataclass(frozen=True)
class Context:
    """What build.py hands to an algorithm's source; made once a run."""

    tokenizer: Any
    mesh: Mesh
    policy: Policy
    rows: Callable[[], Source]  # DataConfig rows packed and put on the mesh
    seed: int
    process_index: int = 0
    process_count: int = 1


@dataclasses.dataclass(frozen=True)
class SlowRule:
    """How step.py moves a slow copy of a role's weights: an EMA, or a copy every k applied steps."""

    role: str
    decay: float | None = None  # EMA: slow <- decay * slow + (1 - decay) * params
    every: int | None = None  # copy: slow <- params when step % every == 0

    def __post_init__(self):
        if (self.decay is None) == (self.every is None):
            raise ValueError("SlowRule: give exactly one of decay and every")


class Algorithm(abc.ABC):
    """Base of every algorithm; a subclass is a frozen pydantic dataclass with a Literal field `name`."""

    rows: ClassVar[RowKind] = "examples"  # what the data section's rows are to it
    trains: ClassVar[tuple[str, ...]] = ("policy",)
    needs: ClassVar[tuple[str, ...]] = ()  # frozen roles besides a LoRA base
    slow: ClassVar[dict[str, SlowRule]] = {}  # or a property, where the config decides
    stochastic: ClassVar[bool] = False  # the loss draws from its rng; likewise
    whole_batch: ClassVar[bool] = False  # the loss is no sum over units: micro-batches would change it
    name: str

    @abc.abstractmethod
    def source(self, ctx: Context) -> Source:
        """Host iterator of batches for this method."""

    def scalars(self) -> dict[str, Array]:
        """What of state.scalars is this method's own (running means), at step 0; prepare returns its next values."""
        return {}

    def annotate(self, apply: Policy, frozen: Frozen, batch: Batch) -> Batch:
        """Columns from frozen models; on the device, without gradient, once a batch at the source.

        Held-out batches are annotated too.
        """
        return batch

    @abc.abstractmethod
    def prepare(self, apply: Policy, state: TrainState, frozen: Frozen, batch: Batch) -> tuple[Batch, dict[str, Array]]:
        """Weights and batch statistics over the whole global batch, at the top of the step; new state.scalars."""

    @abc.abstractmethod
    def loss(
        self, apply: Policy, params: dict, frozen: Frozen, batch: Batch, rng: Array | None
    ) -> tuple[Array, Metrics]:
        """A weighted sum over one micro-batch, and metrics that add up over micro-batches."""

    def evaluate(self, apply: Policy, state: TrainState, frozen: Frozen, batch: Batch) -> dict[str, Mean]:
        """Held-out metrics of one batch; the loop adds the two parts of each Mean over batches, which differ in size:
        so a loss weighs its Means by counts (raw_weights), not by weights that were normalised within the batch.
        """
        batch, _ = self.prepare(apply, state, frozen, batch)
        _, metrics = self.loss(apply, state.params, frozen, batch, None)
        return {name: value for name, value in metrics.items() if isinstance(value, Mean)}


def registry() -> dict[str, type[Algorithm]]:
    """Name -> class of every algorithm imported so far, found by subclass."""
    found: dict[str, type[Algorithm]] = {}
    todo = list(Algorithm.__subclasses__())
    while todo:
        cls = todo.pop()
        todo += cls.__subclasses__()
        field = getattr(cls, "__dataclass_fields__", {}).get("name")
        if field is not None:
            found[field.default] = cls
    return dict(sorted(found.items()))


Normalise = Literal["token", "sequence", "constant"]


def token_weights(mask: Array, segments: Array, rule: Normalise, constant: float | None = None) -> Array:
    """f32[B,T] weights of trainable targets over the whole batch, so that a loss is their plain weighted sum.

        token     1 / number of trainable targets
        sequence  1 / (trainable targets of the sequence * number of sequences that have any)
        constant  1 / constant

    mask bool[B,T]; segments i32[B,T]. Sequences are segments, never packed rows. All zero where nothing is trainable.
    """
    raw = raw_weights(mask, segments, rule)
    return raw / (constant if rule == "constant" else jnp.maximum(jnp.round(jnp.sum(raw)), 1.0))


def raw_weights(mask: Array, segments: Array, rule: Normalise) -> Array:
    """f32[B,T]: token_weights before they are divided; they add up over batches, and count targets or sequences."""
    wanted = mask.astype(jnp.float32)
    if rule != "sequence":
        return wanted
    counts = segment_sums(wanted, segments, mask.shape[1])  # [B,T+1]: a row holds at most T segments
    return wanted / jnp.maximum(jnp.take_along_axis(counts, segments, axis=1), 1.0)
