"""A TFDS builder as users write them; prepared as ArrayRecord it needs no TensorFlow."""

import numpy as np
import tensorflow_datasets as tfds

from tests import tiny

TURN = {"role": tfds.features.Text(), "content": tfds.features.Text(), "meta": {"likes": np.int64}}


class JaxpostToyChats(tfds.core.GeneratorBasedBuilder):
    """tests.tiny's chats, with a name in each; every third has no turns in `more`."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = {
            "name": tfds.features.Text(),
            "messages": tfds.features.Sequence({"role": tfds.features.Text(), "content": tfds.features.Text()}),
            "more": tfds.features.Sequence(TURN),
            "tags": tfds.features.Sequence(tfds.features.Text()),
            "score": np.float32,
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(100, 1), "heldout": self._generate_examples(10, 2)}

    def _generate_examples(self, count, seed):
        for i, row in enumerate(tiny.rows(count, seed)):
            more = [{"role": "user", "content": f"é{i}", "meta": {"likes": i + j}} for j in range(i % 3)]
            yield i, {**row, "name": f"n{i}", "more": more, "tags": ["ü"] * (i % 2), "score": 0.5}
