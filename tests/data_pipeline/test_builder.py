import functools
import pickle

import numpy as np

from ttt_jax.data.builder import TokenRecordings, _generate, load_builder


def example(name):
    return {"id": name, "codes": np.full((3, 17), int(name), np.int32), "metadata": "{}"}


def test_records_keep_their_order_and_empty_splits_are_left_out(tmp_path):
    records = {"train": [str(i) for i in range(12)], "validation": [], "test": ["7"]}
    builder = TokenRecordings(records=records, make_example=example, num_streams=17, data_dir=str(tmp_path))
    builder.download_and_prepare()
    stored = load_builder(builder.data_path)
    assert set(stored.info.splits) == {"train", "test"}
    source = stored.as_data_source(split="train")
    assert [record["id"] for record in source] == [str(i).encode() for i in range(12)]
    assert (source[11]["codes"] == 11).all()
    assert source[0]["codes"].dtype == np.int32


def test_a_record_is_made_by_a_picklable_function():
    """What a Beam worker gets: the function and one (index, name)."""
    generate = pickle.loads(pickle.dumps(functools.partial(_generate, example)))
    assert generate((4, "9"))[0] == 4


def test_a_beam_pipeline_stores_the_same_records(tmp_path):
    records = {"train": [str(i) for i in range(12)], "validation": [], "test": ["7"]}
    builder = TokenRecordings(
        records=records, make_example=example, num_streams=17, use_beam=True, data_dir=str(tmp_path)
    )
    builder.download_and_prepare()
    stored = load_builder(builder.data_path)
    assert set(stored.info.splits) == {"train", "test"}
    source = stored.as_data_source(split="train")
    assert [record["id"] for record in source] == [str(i).encode() for i in range(12)]
    assert [record["codes"][0, 0] for record in source] == list(range(12))
