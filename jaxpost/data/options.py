"""Config section `data`."""

from __future__ import annotations

import dataclasses
from typing import Literal

import pydantic

from jaxpost.data.pack import Truncation
from jaxpost.data.sources import SourceConfig, split_source
from jaxpost.errors import ConfigError
from jaxpost.fields import SECTION, Bool, Fraction, NonEmptyStr, NonNegInt, PosInt


@pydantic.dataclasses.dataclass(frozen=True, config=SECTION)
class DataConfig:
    """What is read, how it becomes rows, and how many rows make a step."""

    train: tuple[SourceConfig, ...] = ()
    eval: tuple[SourceConfig, ...] = ()  # held out: read once, whole, in file order
    path: NonEmptyStr | None = None  # shorthand: the source of the only entry of train
    batch_size: PosInt = 8  # rows a step, over all hosts and micro-batches
    seq_len: PosInt = 1024  # positions a row
    packing: Literal["best_fit", "none", "bucketed"] = "best_fit"
    buckets: tuple[PosInt, ...] = ()  # widths of "bucketed", one compilation each; the last is seq_len
    max_segments: PosInt | None = None  # examples a row; None: as few as fill rows well, from the first records
    shuffle: Bool = True
    workers: NonNegInt = 0  # processes that read and tokenise; 0: a thread
    loss_on: Literal["assistant", "last", "completion", "all"] = "assistant"  # which tokens are trained
    truncation: Truncation = "drop"  # of an example longer than seq_len
    on_bad_row: Literal["error", "skip"] = "error"
    max_bad_fraction: Fraction = 0.05  # of the rows read so far, under "skip"
    window: PosInt = 8192  # records that are packed together

    @pydantic.model_validator(mode="after")
    def _check(self) -> DataConfig:
        if self.packing == "bucketed":
            if not self.buckets or self.buckets[-1] != self.seq_len:
                raise ValueError(f"buckets: packing 'bucketed' needs widths that end with seq_len {self.seq_len}")
            if any(a >= b for a, b in zip(self.buckets, self.buckets[1:], strict=False)):
                raise ValueError(f"buckets: {list(self.buckets)} must rise")
        elif self.buckets:
            raise ValueError(f"buckets: only for packing 'bucketed', not {self.packing!r}")
        weighted = [source.weight is not None for source in self.train]
        if any(weighted) and not all(weighted):
            raise ValueError(f"train[{weighted.index(False)}].weight: give every source a weight, or none")
        for i, source in enumerate(self.eval):
            if source.weight is not None:
                raise ValueError(f"eval[{i}].weight: held-out sources are read once, whole")
        if self.path is not None and len(self.train) > 1:
            raise ValueError(f"path: train lists {len(self.train)} sources; set train[0].source instead")
        return self

    @property
    def sources(self) -> tuple[SourceConfig, ...]:
        """Training sources: train, or path. Raises ConfigError if there is none."""
        if self.path is None:
            if not self.train:
                raise ConfigError("data.train: no source; name one, or pass data.path=FILE")
            return self.train
        kind, pattern = split_source(self.path)
        if not kind:
            raise ConfigError(
                f"data.path: {self.path}: unknown suffix; write jsonl:FILE, parquet:FILE, text:FILE or tfds:NAME"
            )
        try:
            if self.train:
                return (dataclasses.replace(self.train[0], source=f"{kind}:{pattern}"),)
            return (SourceConfig(source=f"{kind}:{pattern}"),)
        except pydantic.ValidationError as error:
            raise ConfigError(f"data.path: {error.errors()[0]['msg'].removeprefix('Value error, ')}") from None

    @property
    def segments_per_row(self) -> int:
        """S: the most segments a row may hold, fixed for a run; a bound of it until the data have settled it."""
        return self.max_segments or max(8, self.seq_len // 32 * 2)  # even: pairs take two

    @property
    def widths(self) -> tuple[int, ...]:
        """Widths that batches may have."""
        return self.buckets or (self.seq_len,)
