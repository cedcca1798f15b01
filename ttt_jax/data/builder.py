"""The TFDS builder: tokenized recordings on disk to ArrayRecord, without TensorFlow."""

import functools
import pathlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

Example = dict[str, Any]


class TokenRecordings(tfds.core.GeneratorBasedBuilder):
    """Whole recordings as codes int32 [T, streams] (`Recording.codes` transposed), an id and JSON metadata.

    Args:
        records: split -> paths of tokenized recordings, in the order they are stored; splits without any are left out.
        make_example: picklable; path -> {id, codes, metadata}. With `use_beam` it runs as a `beam.Map`.
        num_streams: text and audio streams per recording.
        use_beam: generate each split as a Beam pipeline.
        **kwargs: of `tfds.core.GeneratorBasedBuilder`.
    """

    VERSION = tfds.core.Version("1.0.0")

    def __init__(
        self,
        *,
        records: Mapping[str, Sequence[pathlib.Path]],
        make_example: Callable[[str], Example],
        num_streams: int,
        use_beam: bool = False,
        **kwargs,
    ):
        self._records = records
        self._make_example = make_example
        self._num_streams = num_streams
        self._use_beam = use_beam
        super().__init__(file_format="array_record", **kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        codes = tfds.features.Tensor(shape=(None, self._num_streams), dtype=np.int32, encoding="bytes")
        text = tfds.features.Text
        features = tfds.features.FeaturesDict({"id": text(), "codes": codes, "metadata": text()})
        return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

    def _split_generators(self, dl_manager):
        return {split: self._generate_examples(paths) for split, paths in self._records.items() if paths}

    def _generate_examples(self, paths: Sequence[pathlib.Path]):
        numbered = list(enumerate(map(str, paths)))
        generate = functools.partial(_generate, self._make_example)
        if self._use_beam:
            beam = tfds.core.lazy_imports.apache_beam
            return beam.Create(numbered) | beam.Map(generate)
        return map(generate, numbered)


def _generate(make_example: Callable[[str], Example], item: tuple[int, str]) -> tuple[int, Example]:
    index, path = item
    return index, make_example(path)  # without shuffling the key is the record's place


def load_builder(directory: pathlib.Path) -> tfds.core.DatasetBuilder:
    """The builder of a dataset already written into `directory`."""
    with warnings.catch_warnings():
        # tensorflow-datasets 4.9.10 reads a protobuf field that protobuf 6 deprecates.
        warnings.filterwarnings("ignore", r"label\(\) is deprecated", DeprecationWarning)
        return tfds.builder_from_directory(directory)
