import numpy as np
import pytest

from ttt_jax.data.tokens import TokenInfo, check_codes, info_from_json, info_to_json

INFO = TokenInfo("codec2", 12.5, 8000, 8, 512, 100)


def test_description_survives_the_disk(tmp_path):
    path = tmp_path / "tokens.json"
    path.write_text(info_to_json(INFO, {"train": [3, 4]}))
    assert info_from_json(path) == (INFO, {"train": [3, 4]})


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"num_frames": {}}', '{"num_frames": {"train": ["x"]}}'])
def test_a_broken_description_says_what_to_do(tmp_path, content):
    path = tmp_path / "tokens.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"not a token dataset's description.*make the dataset again"):
        info_from_json(path)


def test_a_senseless_number_is_named(tmp_path):
    path = tmp_path / "tokens.json"
    path.write_text(info_to_json(INFO, {}).replace('"card": 512', '"card": 0'))
    with pytest.raises(ValueError, match="card must be a positive number, got 0"):
        info_from_json(path)


def test_codes_must_lie_in_their_cardinality():
    codes = np.zeros((17, 5), np.int32)
    codes[0], codes[1:] = 99, 511
    codes[9:, 2] = -1
    check_codes(codes, INFO, "r")
    for stream, value in ((0, 100), (3, 512), (16, -2)):
        bad = codes.copy()
        bad[stream, 4] = value
        with pytest.raises(ValueError, match=rf"r: stream {stream} holds {value} at frame 4, expected -1 or a code in"):
            check_codes(bad, INFO, "r")
    with pytest.raises(ValueError, match=r"shape \[17, frames\], got int32 \(16, 5\)"):
        check_codes(codes[1:], INFO, "r")
    with pytest.raises(ValueError, match="float64"):
        check_codes(codes.astype(float), INFO, "r")
