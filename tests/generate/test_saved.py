"""What is saved is the whole conversation, and belongs to its models."""

import dataclasses

import jax
import numpy as np
import pytest

from ttt_jax.generate import Configs, init_conversation, load_conversation, save_conversation
from ttt_jax.generate import saved as saved_module
from ttt_jax.models.moshi.insertion import without_ttt


@pytest.fixture(scope="module")
def models(moshi, mimi):
    return Configs.of(moshi[0], mimi[0]), (moshi[1], mimi[1])


@pytest.fixture(scope="module")
def conversation(models):
    """Two rows, every number in it another."""
    leaves, structure = jax.tree.flatten(init_conversation(*models, 2))
    rng = np.random.default_rng(0)
    return jax.tree.unflatten(structure, [rng.integers(1, 100, x.shape).astype(x.dtype) for x in leaves])


@pytest.fixture(scope="module")
def saved(tmp_path_factory, models, conversation):
    directory = tmp_path_factory.mktemp("saved") / "state"
    save_conversation(directory, *models, conversation)
    return directory


def test_it_comes_back_bit_by_bit(saved, models, conversation):
    loaded = load_conversation(saved, *models)
    jax.tree.map(np.testing.assert_array_equal, loaded, conversation)
    assert jax.tree.structure(loaded) == jax.tree.structure(conversation)
    assert [x.dtype for x in jax.tree.leaves(loaded)] == [x.dtype for x in jax.tree.leaves(conversation)]
    paths = {jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(conversation)}
    for part in (".encoder", ".decoder", ".stream.tokens", ".stream.layers[0].attention", ".stream.layers[1].ttt"):
        assert any(path.startswith(part) for path in paths)


def test_how_many_codebooks_mimi_was_told_to_use_does_not_matter(saved, models):
    configs, params = models
    load_conversation(saved, configs._replace(mimi=dataclasses.replace(configs.mimi, num_codebooks=3)), params)


def test_fields_that_there_were_not_when_it_was_saved_have_their_defaults(models, conversation, tmp_path, monkeypatch):
    def older(configs, params):
        fields = current(configs, params)
        del fields["moshi"]["ttt"]["design"], fields["moshi"]["sinks"], fields["mimi"]["published_ring"]
        return fields

    current = saved_module._model
    with monkeypatch.context() as patch:
        patch.setattr(saved_module, "_model", older)
        save_conversation(tmp_path / "old", *models, conversation)
    load_conversation(tmp_path / "old", *models)
    configs, params = models
    with pytest.raises(ValueError, match=r"moshi\.sinks was 0, is 1"):
        load_conversation(tmp_path / "old", configs._replace(moshi=dataclasses.replace(configs.moshi, sinks=1)), params)


def test_another_model_is_refused(saved, models):
    configs, params = models
    other = configs._replace(moshi=dataclasses.replace(configs.moshi, context=7))
    with pytest.raises(ValueError, match=r"state is .* with another model: moshi\.context was 6, is 7\. Go"):
        load_conversation(saved, other, params)
    ttt = dataclasses.replace(configs.moshi.ttt, mini_batch_size=4)
    with pytest.raises(ValueError, match=r"moshi\.ttt\.mini_batch_size was 3, is 4"):
        load_conversation(saved, configs._replace(moshi=dataclasses.replace(configs.moshi, ttt=ttt)), params)
    other = configs._replace(mimi=dataclasses.replace(configs.mimi, published_ring=True))
    with pytest.raises(ValueError, match=r"mimi\.published_ring was False, is True"):
        load_conversation(saved, other, params)
    for changed in (without_ttt(params[0]), params[0] | {"text_linear": params[0]["text_linear"] + 1}):
        with pytest.raises(ValueError, match=r"its weights are others \(another checkpoint, or another --ttt\)"):
            load_conversation(saved, configs, (changed, params[1]))


def test_whole_or_not_at_all(saved, models, conversation, tmp_path):
    with pytest.raises(FileExistsError, match="state exists"):
        save_conversation(saved, *models, conversation)
    with pytest.raises(FileNotFoundError, match="none holds no saved conversation"):
        load_conversation(tmp_path / "none", *models)
    save_conversation(tmp_path / "damaged", *models, conversation)
    data = max((tmp_path / "damaged").rglob("d/*"), key=lambda path: path.stat().st_size)
    data.write_bytes(data.read_bytes()[:100])
    with pytest.raises(ValueError, match="damaged: the saved conversation cannot be read"):
        load_conversation(tmp_path / "damaged", *models)
