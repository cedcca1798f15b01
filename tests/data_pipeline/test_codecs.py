import numpy as np
import pytest

from ttt_jax.data import codecs


def speechlike(seconds, seed=0):
    """A buzz with a moving formant: Codec2 finds a pitch and a spectrum in it."""
    rng = np.random.default_rng(seed)
    t = np.arange(round(seconds * 8000)) / 8000
    pitch = 120 + 20 * np.sin(2 * np.pi * 0.7 * t)
    phase = 2 * np.pi * np.cumsum(pitch) / 8000
    wav = sum(np.sin(k * phase) / k for k in range(1, 12)) * (0.3 + 0.2 * np.sin(2 * np.pi * 1.3 * t))
    return (0.3 * wav + 0.001 * rng.standard_normal(len(t))).astype(np.float32)


def buzz(seconds):
    """A steady pitch with all its overtones, so that the decoder has little to draw."""
    t = np.arange(round(seconds * 8000)) / 8000
    wav = sum(np.sin(2 * np.pi * 120 * k * t + k * k) / k for k in range(1, 20))
    return (0.1 * wav * (1 + 0.5 * np.sin(2 * np.pi * t))).astype(np.float32)


def test_encode_has_moshis_shape_and_uses_every_field():
    codes = codecs.Codec2().encode(speechlike(4.0))
    assert codes.shape == (8, 50)
    assert codes.dtype == np.int32
    assert codes.min() >= 0
    assert (codes.max(axis=1) < [512, 512, 16, 64] * 2).all()
    assert all(len(np.unique(row)) > 3 for row in codes)


@pytest.mark.parametrize("sizes", [[1] * 50, [639, 1, 641, 5000], [0, 7, 0, 1279, 1281]])
def test_any_split_into_blocks_gives_the_same_codes(sizes):
    wav = speechlike(1.3)
    whole = codecs.Codec2().encode(wav)
    blocks = np.split(wav, np.cumsum(sizes))
    encoder = codecs.Codec2().encoder()
    pieces = [encoder.push(block) for block in blocks]
    np.testing.assert_array_equal(np.concatenate([*pieces, encoder.finish()], axis=1), whole)
    stereo = codecs.encode_blocks((np.stack([block, 0 * block]) for block in blocks), codecs.Codec2())
    np.testing.assert_array_equal(stereo[:8], whole)


def test_decode_restores_loudness_over_time():
    wav = speechlike(4.0)
    wav[:16000] = 0
    decoded = codecs.Codec2().decode(codecs.Codec2().encode(wav))
    assert decoded.shape == (32000,)
    assert decoded.dtype == np.float32
    quiet, loud = decoded[:15000].std(), decoded[17000:].std()
    assert loud > 20 * quiet
    assert 0.3 < loud / wav[17000:].std() < 3


def test_codes_survive_the_fields_packing():
    """Decoding packs the fields back: the C decoder reads the same energy and pitch that the encoder wrote."""
    codes = codecs.Codec2().encode(speechlike(2.0))
    quieter = codes.copy()
    quieter[[2, 6]] = np.maximum(quieter[[2, 6]] - 4, 0)
    ratio = codecs.Codec2().decode(quieter).std() / codecs.Codec2().decode(codes).std()
    assert ratio < 0.5


def test_silence_is_one_constant_frame():
    codes = codecs.Codec2().encode(np.zeros(8000, np.float32))
    assert (codes == codes[:, :1]).all()


def test_decoding_block_by_block_goes_on_where_the_block_before_ended():
    codes = codecs.Codec2().encode(buzz(4.0))
    whole = codecs.Codec2().decode(codes)
    blocks = [codes[:, a:b] for a, b in ((0, 1), (1, 1), (1, 30), (30, 50))]
    decoder = codecs.Codec2().decoder()
    streamed = np.concatenate([decoder.push(block) for block in blocks])
    # The decoder draws the phases of what has no pitch: 0.004 between two decodings of these codes.
    assert np.abs(streamed - whole).max() < 0.02
    anew = np.concatenate([codecs.Codec2().decode(block) for block in blocks])
    assert np.abs(anew - whole).max() > 0.1


def test_missing_frames_decode_to_silence_and_out_of_field_values_are_clipped():
    codes = codecs.Codec2().encode(speechlike(1.0))[:, :12]
    codes[:, 3] = -1
    codes[2, 5] = 511
    wav = codecs.Codec2().decode(codes).reshape(12, 640)
    assert (wav[3] == 0).all()
    assert np.isfinite(wav).all()
    assert codecs.Codec2().decode(np.zeros((8, 0), np.int32)).shape == (0,)


def test_bad_input():
    with pytest.raises(ValueError, match=r"codec: expected one of \['codec2', 'mimi'\], got 'opus'"):
        codecs.get_codec("opus")
    with pytest.raises(ValueError, match="not finite"):
        codecs.Codec2().encode(np.array([0.0, np.nan]))
    with pytest.raises(ValueError, match="one channel"):
        codecs.Codec2().encode(np.zeros((2, 640)))
    with pytest.raises(ValueError, match=r"integers \[8, T\], got float64 \(8, 2\)"):
        codecs.Codec2().decode(np.zeros((8, 2)))
    with pytest.raises(ValueError, match="at least one block"):
        codecs.encode_blocks([], codecs.Codec2())
