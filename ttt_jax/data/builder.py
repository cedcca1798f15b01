"""The TFDS builders: tokenized recordings and encoded videos to ArrayRecord, without TensorFlow."""

import functools
import pathlib
import shutil
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

Example = dict[str, Any]


class _Records(tfds.core.GeneratorBasedBuilder):
    """Examples by name in the order of the names."""

    VERSION = tfds.core.Version("1.0.0")

    def __init__(
        self,
        *,
        records: Mapping[str, Sequence[str]],
        make_example: Callable[[str], Example],
        features: Mapping[str, Any],
        use_beam: bool = False,
        **kwargs,
    ):
        self._records = records
        self._make_example = make_example
        self._features = features
        self._use_beam = use_beam
        super().__init__(file_format="array_record", **kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        features = tfds.features.FeaturesDict(self._features)
        return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

    def _split_generators(self, dl_manager):
        return {split: self._generate_examples(names) for split, names in self._records.items() if names}

    def _generate_examples(self, names: Sequence[str]):
        numbered = list(enumerate(names))
        generate = functools.partial(_generate, self._make_example)
        if self._use_beam:
            beam = tfds.core.lazy_imports.apache_beam
            return beam.Create(numbered) | beam.Map(generate)
        return map(generate, numbered)


class TokenRecordings(_Records):
    """Whole recordings as codes int32 [T, streams] (`Recording.codes` transposed), an id and JSON metadata.

    Args:
        records: split -> names of recordings, in the order they are stored; splits without any are left out.
        make_example: picklable; name -> {id, codes, metadata}. With `use_beam` it runs as a `beam.Map`.
        num_streams: text and audio streams per recording.
        use_beam: generate each split as a Beam pipeline.
        **kwargs: of `tfds.core.GeneratorBasedBuilder`.
    """

    def __init__(self, *, num_streams: int, **kwargs):
        codes = tfds.features.Tensor(shape=(None, num_streams), dtype=np.int32, encoding="bytes")
        text = tfds.features.Text
        super().__init__(features={"id": text(), "codes": codes, "metadata": text()}, **kwargs)


class VideoRecords(_Records):
    """Videos as latents float16 [frames, channels, h, w] and the embeddings of their texts float16 [scenes, L, width].

    Args:
        records: split -> names of videos, in the order they are stored; splits without any are left out.
        make_example: name -> {id, video, text, captions}, the last as JSON.
        video_shape: of all videos.
        text_shape: of the texts of a video.
        **kwargs: of `tfds.core.GeneratorBasedBuilder`.
    """

    def __init__(self, *, video_shape: Sequence[int], text_shape: Sequence[int], **kwargs):
        shapes = {"video": tuple(video_shape), "text": tuple(text_shape)}
        tensors = {
            name: tfds.features.Tensor(shape=shape, dtype=np.float16, encoding="bytes")
            for name, shape in shapes.items()
        }
        text = tfds.features.Text
        super().__init__(features={"id": text(), **tensors, "captions": text()}, **kwargs)


def _generate(make_example: Callable[[str], Example], item: tuple[int, str]) -> tuple[int, Example]:
    index, name = item
    return index, make_example(name)  # without shuffling the key is the record's place


def write_records(directory: pathlib.Path, builder: type[_Records], **options: Any) -> None:
    """Writes a dataset's files into `directory`; `options` are the builder's."""
    own = directory / "tfds"
    made = builder(data_dir=str(own), **options)
    made.download_and_prepare()
    for file in pathlib.Path(made.data_path).iterdir():
        file.rename(directory / file.name)
    shutil.rmtree(own)


def load_builder(directory: pathlib.Path) -> tfds.core.DatasetBuilder:
    """The builder of a dataset already written into `directory`."""
    with warnings.catch_warnings():
        # tensorflow-datasets 4.9.10 reads a protobuf field that protobuf 6 deprecates.
        warnings.filterwarnings("ignore", r"label\(\) is deprecated", DeprecationWarning)
        return tfds.builder_from_directory(directory)
